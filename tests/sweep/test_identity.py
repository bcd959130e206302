"""Laws of which folder a cell has and what is left to do there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from fedray import config as config_room
from fedray.config import Shared, assemble, conf_folder, register, resolved
from fedray.errors import ConfigError
from fedray.sweep.identity import distinct, folder_name, label, left_to_do, place, varying

SMALL = ["data=digits", "num_clients=6", "cohort=3"]


def configuration(*overrides: str) -> dict[str, Any]:
    register()
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        return resolved(compose("config", overrides=[*SMALL, *overrides]))


def identity(*overrides: str) -> str:
    return config_room.identity(configuration(*overrides), digests={}, shared=Shared())


def a_run(folder: Path, rows: int = 0, checkpoints: tuple[int, ...] = (), **manifest: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"run_id": "ab" * 8, "rounds": 9, **manifest}))
    (folder / "rounds.jsonl").write_text("".join(json.dumps({"round": r + 1}) + "\n" for r in range(rows)))
    for round in checkpoints:
        (folder / "checkpoints" / f"round-{round:06d}").mkdir(parents=True)
    return folder


def test_the_identity_of_a_cell_is_the_id_that_its_run_records() -> None:
    config = configuration("pruner=magnitude", "seed=3")
    assert config_room.identity(config, digests={}, shared=Shared()) == assemble(config).spec.run_id


@pytest.mark.parametrize(
    "outside", ["runtime=inline", "tracker.progress=none", "rounds=7", "name=other", "checkpoint.every=3"]
)
def test_where_it_runs_how_it_is_tracked_and_how_long_it_is_leave_the_identity(outside: str) -> None:
    assert identity(outside) == identity()


@pytest.mark.parametrize("inside", ["seed=1", "trainer.lr=0.3", "pruner=random", "partition.alpha=0.7", "cohort=2"])
def test_what_decides_the_result_changes_the_identity(inside: str) -> None:
    assert identity(inside) != identity()


def test_a_known_digest_spares_loading_the_data_and_other_settings_of_them_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digests: dict[str, str] = {}
    first = config_room.identity(configuration(), digests=digests, shared=Shared())
    loads: list[str] = []
    real = config_room._make
    monkeypatch.setattr(config_room, "_make", lambda node, group: (loads.append(group), real(node, group))[1])
    assert config_room.identity(configuration("seed=0"), digests=digests, shared=Shared()) == first
    assert loads == []
    config_room.identity(configuration("data=synthetic"), digests=digests, shared=Shared())
    assert loads == ["data"]


def test_a_file_that_changed_is_loaded_again(tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_text("abcdef" * 100)
    node = {"_target_": "fedray.data.text", "path": str(file)}
    before = config_room._made_from(node, None)
    assert config_room._made_from(node, None) == before
    file.write_text("abcdeg" * 101)
    assert config_room._made_from(node, None) != before


def test_cells_share_data_and_partition_where_they_agree_in_them() -> None:
    shared = Shared()
    made = [assemble(configuration(*o), shared=shared) for o in (["pruner=random"], ["pruner=none"], ["seed=1"])]
    assert made[0].population is made[1].population
    assert made[0].population is not made[2].population
    assert made[0].population.train_x is made[2].population.train_x


def test_a_label_says_only_what_differs_and_a_folder_needs_no_quotes() -> None:
    cells = [["+experiment=x", "pruner=magnitude", f"pruner.sparsity={s}", "name='a b,c'"] for s in (0.5, 0.9)]
    assert [label(one) for one in varying(cells)] == ["sparsity=0.5", "sparsity=0.9"]
    assert label(["a.lr=1", "b.lr=2", "c.k=3"]) == "a.lr=1, b.lr=2, k=3"
    name = folder_name("partition={alpha:0.1,x:[1,2]}, source=/a b/c", "0123456789abcdef")
    assert name == "partition-alpha-0.1-x-1-2_source-a-b-c-01234567"
    assert folder_name("", "0123456789abcdef") == "run-01234567"
    assert len(folder_name("k=" + "x" * 999, "0123456789abcdef")) < 120
    # What differs behind the cut is not lost.
    long = [folder_name(f"k={'x' * 200}, rounds={rounds}", "0123456789abcdef") for rounds in (10, 20)]
    assert long[0] != long[1]


def test_a_run_keeps_its_folder_when_another_sweep_labels_it_otherwise(tmp_path: Path) -> None:
    run_id = "ab" * 8
    a_run(tmp_path / f"seed-0-{run_id[:8]}")
    assert place(tmp_path, [run_id], [["pruner=none", "seed=0"]]) == [tmp_path / f"seed-0-{run_id[:8]}"]
    # The eight digits alone are not enough, and lengths are runs of their own where they are what differs.
    other = run_id[:8] + "0" * 8
    assert place(tmp_path, [other], [["seed=5"]]) == [tmp_path / f"seed-5-{run_id[:8]}"]
    assert place(tmp_path, [run_id], [["rounds=20"]]) == [tmp_path / f"rounds-20-{run_id[:8]}"]


def test_where_one_run_is_there_in_two_lengths_neither_is_taken_for_the_other(tmp_path: Path) -> None:
    run_id = "ab" * 8
    for rounds in (10, 20):
        a_run(tmp_path / f"rounds-{rounds}-{run_id[:8]}")
    assert place(tmp_path, [run_id], [["seed=0"]]) == [tmp_path / f"seed-0-{run_id[:8]}"]
    two = place(tmp_path / "other", [run_id, run_id], [["+experiment=short"], ["+experiment=long"]])
    assert len(set(two)) == 2
    with pytest.raises(ConfigError, match="two cells of the sweep would have the folder name-a-b-"):
        place(tmp_path / "other", [run_id, run_id], [["name='a b'"], ["name=a-b"]])


def test_equal_runs_are_one_however_they_are_written() -> None:
    ids = ["a", "a", "b", "a", "a"]
    differs = [["pruner=x"], ["pruner=x", "pruner.sparsity=0.8"], ["pruner=y"], ["pruner=x", "name=n"], ["pruner=x"]]
    assert distinct(ids, differs, [10, 10, 10, 10, 20]) == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("manifest", "rows", "checkpoints", "what", "resume_round"),
    [
        ({"status": "finished"}, 9, (5,), "nothing", None),
        ({"status": "finished", "rounds": 20}, 20, (), "nothing", None),
        ({"status": "finished", "stopped": "reached"}, 4, (), "nothing", None),  # it ended early by its own rule
        ({"status": "finished", "rounds": 5}, 5, (3,), "go on", 3),
        ({"status": "running"}, 7, (3, 6), "go on", 6),
        ({"status": "running"}, 5, (3, 6), "go on", 3),  # the row of round 6 was not written any more
        ({"status": "interrupted"}, 2, (), "go on", 0),
        ({"status": "running"}, 0, (), "repeat", 0),
        ({"status": "failed", "error": "x"}, 7, (6,), "repeat", 0),
        ({"status": "failed", "error": "x", "died": True}, 7, (6,), "go on", 6),
    ],
)
def test_what_is_left_follows_from_the_manifest(
    tmp_path: Path, manifest: dict[str, Any], rows: int, checkpoints: tuple[int, ...], what: str, resume_round: int
) -> None:
    run = a_run(tmp_path / "run", rows, checkpoints, **manifest)
    left = left_to_do(run, "ab" * 8, 9)
    assert (left.what, left.resume_round) == (what, resume_round)


def test_a_folder_without_a_run_is_begun_and_another_run_is_refused(tmp_path: Path) -> None:
    assert left_to_do(tmp_path / "none", "ab" * 8, 9).what == "begin"
    run = a_run(tmp_path / "run", status="finished")
    with pytest.raises(ConfigError, match=r"holds run abab.* this cell is run 0123.*hydra\.sweep\.dir"):
        left_to_do(run, "0123", 9)
