"""Laws of what W&B shows of a run besides its rows: labels and tables."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedray.track.store import Store
from fedray.track.wandb_content import artifact_files, client_table, labels_of, layer_table


def manifest(**choices: str) -> dict[str, Any]:
    return {
        "config": {
            "name": "grid",
            "seed": 1,
            "rounds": 20,
            "trainer": {"lr": 0.1},
            "pruner": {"_target_": "fedray.pruners.FedDST", "sparsity": 0.9},
            "partition": {"_target_": "fedray.data.Dirichlet", "alpha": 0.3},
            "data": {"_target_": "fedray.data.hub", "path": "/here"},
            "runtime": {"kind": "ray"},
            "tracker": {"progress": "auto"},
            "checkpoint": {"every": 10},
        },
        "choices": {"pruner": "feddst", "strategy": "fedavg", "correction": "none", "personal": "none"} | choices,
        "data": {"name": "mnist", "digest": "d1"},
    }


@pytest.mark.parametrize(
    ("choices", "name", "tags"),
    [
        ({}, "feddst 0.9 alpha=0.3 seed=1", ("feddst", "fedavg", "mnist")),
        ({"pruner": "none"}, "fedavg alpha=0.3 seed=1", ("fedavg", "mnist")),
        (
            {"correction": "fedprox+fedsam", "personal": "ditto", "strategy": "fedadam"},
            "feddst+fedadam+fedprox+fedsam+ditto 0.9 alpha=0.3 seed=1",
            ("feddst", "fedadam", "mnist", "fedprox", "fedsam", "ditto"),
        ),
    ],
)
def test_name_and_tags_tell_the_method_and_leave_out_what_is_none(
    choices: dict[str, str], name: str, tags: tuple[str, ...]
) -> None:
    labels = labels_of(manifest(**choices))
    assert (labels.name, labels.tags) == (name, tags)


def test_a_name_says_nothing_of_what_a_run_does_not_have() -> None:
    plain = manifest(pruner="none")
    plain["config"] |= {"pruner": {}, "partition": {"_target_": "fedray.data.IID"}}
    assert labels_of(plain).name == "fedavg seed=1"


def test_an_older_manifest_without_choices_is_labelled_by_its_components() -> None:
    older = manifest()
    del older["choices"]
    older["config"]["correction"] = {"fedprox": {"_target_": "fedray.corrections.FedProx"}}
    assert labels_of(older).name == "feddst+fedprox 0.9 alpha=0.3 seed=1"


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("seed", 2, True),
        ("rounds", 40, True),
        ("runtime.kind", "inline", True),
        ("tracker.progress", "none", True),
        ("checkpoint.every", 1, True),
        ("data.path", "/there", True),
        ("trainer.lr", 0.2, False),
        ("pruner.sparsity", 0.8, False),
        ("partition.alpha", 1.0, False),
    ],
)
def test_a_group_is_the_runs_that_differ_only_in_what_does_not_change_the_result_or_in_their_seed(
    key: str, value: Any, same: bool
) -> None:
    other = copy.deepcopy(manifest())
    *path, last = key.split(".")
    at = other["config"]
    for part in path:
        at = at[part]
    assert at[last] != value
    at[last] = value
    assert (labels_of(other).group == labels_of(manifest()).group) is same


def test_other_data_in_the_same_place_are_another_group() -> None:
    other = manifest()
    other["data"] = {"name": "mnist", "digest": "d2"}
    assert labels_of(other).group != labels_of(manifest()).group
    assert labels_of(other).group.startswith("grid-")


def test_layers_of_an_unfinished_run_are_those_that_its_last_row_knows(tmp_path: Path) -> None:
    row = {"round": 3, "model/layer_sparsity/conv.weight": 0.25, "model/sparsity": 0.2}
    assert layer_table(tmp_path, row).rows == (("conv.weight", None, None, None, 0.25),)
    assert layer_table(tmp_path, {}).rows == ()


def test_layers_of_a_dense_run_keep_everything_and_have_no_mask_to_keep(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "config.yaml").write_text("")
    save_file(
        {"a": np.ones((3, 2), np.float32), "b": np.ones((), np.float32)}, tmp_path / "final" / "model.safetensors"
    )
    assert sorted(layer_table(tmp_path, {}).rows) == [("a", "3x2", 6, 6, 0.0), ("b", "", 1, 1, 0.0)]
    assert list(artifact_files(tmp_path, "final")) == ["model"]
    assert artifact_files(tmp_path, "masks") == artifact_files(tmp_path, "none") == {}


def test_clients_sum_what_they_did_and_keep_the_last_of_what_was_measured(tmp_path: Path) -> None:
    with Store.create(tmp_path, config_yaml="", manifest={}) as store:
        for number, examples in ((1, 10), (2, 12)):
            clients = [
                {"round": number, "client": 7, "num_examples": examples, "num_steps": 3, "train_flops": 1e6,
                 "train/loss": 1 / number, "time/train_s": 0.5, "test/accuracy": number / 10},
                {"round": number, "client": 2, "test/accuracy": 0.9},
            ]  # fmt: skip
            sent = [
                {
                    "round": number,
                    "client": 7,
                    "direction": way,
                    "value_bytes": 100,
                    "mask_bytes": 10,
                    "header_bytes": 1,
                }
                for way in ("up", "down", "down")
            ]
            store.write({"round": number}, clients, sent)
    table = client_table(tmp_path)
    two, seven = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (two["client"], two["rounds"], two["test/accuracy"], two["up_bytes"]) == (2, None, 0.9, None)
    expected = {
        "client": 7, "rounds": 2, "num_examples": 12, "train_flops": 2e6, "train/loss": 0.5, "time/train_s": 1.0,
        "test/accuracy": 0.2, "up_bytes": 222, "down_bytes": 444, "sparsity": None,
    }  # fmt: skip
    assert seven == expected
