"""Laws of going on: a run that was cut off and resumed gives the bits of one that was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fedray
from fedray import tree
from fedray.cli import main
from fedray.errors import ConfigError, RunError
from fedray.round import Context, Fit, Message, Part, PartSpec, Policy, Server
from fedray.sim.checkpoint import State, checkpoints, load, save
from fedray.sim.client import Record
from fedray.sums import Sums
from fedray.track.store import read_manifest, read_rows, read_transfers
from fedray.tree import Layout, Mask, Tree

CELL = [
    "runtime=inline", "model.hidden=[8]", "num_clients=6", "cohort=3", "trainer.batch_size=10", "tracker.progress=none",
    "tracker.wandb.mode=disabled", "checkpoint.every=2",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Control(Policy[Tree, Tree]):
    """A correction with memory on both sides, like control variates: the drift of each client from the mean."""

    def parts(self, params: Layout, buffers: Layout) -> Mapping[str, PartSpec]:
        return {"control": PartSpec(layout=params, direction="up")}

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, Tree]:
        return server, Tree.zeros(server.params.layout)

    def init_client(self, ctx: Context) -> Tree:
        return Tree.zeros(ctx.origin.layout)

    def begin(self, message, job, memory, ctx):  # type: ignore[no-untyped-def]
        from dataclasses import replace

        return message, replace(job, drift=memory), memory

    def end(self, fit: Fit, message: Message, memory: Tree, ctx: Context) -> tuple[Fit, Message, Tree]:
        moved = tree.scale(tree.sub(fit.params, fit.received["params"]), 0.01)
        return fit, message.put("control", Part(value=moved)), tree.add(memory, moved)

    def settle(self, server: Server, sums: Sums, memory: Tree, ctx: Context) -> tuple[Server, Sums, Tree]:
        return server, sums, tree.add(memory, sums.mean("control", otherwise=0.0))


SETTINGS = {
    "plain": [],
    "batchnorm": ["model=batchnorm_cnn", "~model.hidden"],
    "gradual": ["pruner=magnitude", "pruner.schedule=cubic", "pruner.start=1", "pruner.finish=5"],
    "random": ["pruner=random"],
    "feddst": ["pruner=feddst", "pruner.every=2", "pruner.until=6"],
    "stc": ["wire=stc", "pruner=magnitude", "pruner.schedule=cubic", "pruner.start=1", "pruner.finish=5"],
    "powersgd": ["wire=powersgd"],
    "int8": ["wire=int8", "wire.down.feedback=true", "pruner=feddst", "pruner.every=2", "pruner.until=6"],
    "memory": ["+correction.control._target_=test_resume_policies.Control"],
}


@pytest.fixture(autouse=True)
def policies(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("test_resume_policies")
    module.Control = Control  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "test_resume_policies", module)


def cell(name: str) -> list[str]:
    removed = {setting[1:] for setting in SETTINGS[name] if setting.startswith("~")}
    added = [setting for setting in SETTINGS[name] if not setting.startswith("~")]
    return [setting for setting in CELL if setting.split("=")[0] not in removed] + added


@pytest.mark.parametrize("setting", SETTINGS)
def test_twice_r_rounds_are_r_rounds_resumed_for_r_more(tmp_path: Path, setting: str) -> None:
    straight = fedray.run([*cell(setting), "rounds=6"], folder=tmp_path / "straight")
    # The last checkpoint is that of round 4: a fifth round has been run, is forgotten and repeated.
    fedray.run([*cell(setting), "rounds=5"], folder=tmp_path / "half")
    resumed = fedray.resume(tmp_path / "half", ["rounds=6"])
    same = ("digest", "test/accuracy", "wire/total_bytes", "model/train_flops", "train/loss", "model/sparsity")
    assert [[row[name] for name in same] for row in resumed.rows] == [[row[n] for n in same] for row in straight.rows]
    assert read_transfers(resumed.folder) == read_transfers(straight.folder)
    assert all(torch.equal(a, straight.state_dict()[name]) for name, a in resumed.state_dict().items())
    assert resumed.manifest["resumed_after_round"] == 4


def test_a_run_without_a_checkpoint_starts_again_and_gives_the_same(tmp_path: Path) -> None:
    first = fedray.run([*CELL, "rounds=3", "checkpoint.every=0"], folder=tmp_path / "run")
    digests = [row["digest"] for row in first.rows]
    manifest = read_manifest(first.folder)
    (first.folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    again = fedray.resume(first.folder)
    assert [row["digest"] for row in again.rows] == digests


def test_another_runs_settings_and_a_finished_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fedray.run([*CELL, "rounds=2"], folder=tmp_path / "run")
    with pytest.raises(ConfigError, match="only rounds, checkpoint, runtime and tracker may change"):
        fedray.resume(run.folder, ["trainer.lr=0.5"])
    with pytest.raises(ConfigError, match="has finished its 2 rounds; to lengthen it write rounds="):
        fedray.resume(run.folder)
    for bad in (["rounds=ten"], ["+rounds=3"], ["ruonds=3"]):
        assert main(["resume", str(run.folder), *bad]) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1, error
        assert error.startswith(
            ("fedray: rounds is 'ten'", "fedray: '+rounds=3'", "fedray: ruonds is not a setting; did you")
        )
    assert main(["resume", str(tmp_path / "nowhere")]) == 2
    assert len(read_rows(run.folder)) == 2


def test_a_state_comes_back_bit_for_bit_and_an_unreadable_one_is_named(tmp_path: Path) -> None:
    layout = Layout(("a", "b"), ((2, 2), (3,)))
    mask = Mask(layout, torch.tensor([True, False, True, True, False, True, True]), (b"k" * 16, (3,), ("a",)))
    odd = Tree(layout, torch.tensor([0.0, -0.0, 1e-45, float("inf"), 3.5, -1.0, 7.0]))
    server = Server(params=odd, buffers=Tree.zeros(Layout((), ())), mask=mask)
    records = {3: Record(memories=(None, {"c": odd, "n": (1, 2.5, "x")}), known=mask)}
    state = State(
        run_id="r", round=7, server=server, memories=(None, [odd, mask]), records=records, totals={"up_bytes": 2**60},
        train_flops=1e20, elapsed_s=0.1,
    )  # fmt: skip
    path = save(tmp_path, state)
    back = load(path)
    assert tree.equal(back.server.params, odd)
    assert back.server.mask == mask
    assert back.server.mask is not None
    assert back.server.mask.seed == mask.seed
    assert tree.equal(back.records[3].memories[1]["c"], odd)
    assert back.records[3].memories[1]["n"] == (1, 2.5, "x")
    assert tree.equal(back.memories[1][0], odd)
    assert (back.totals, back.train_flops, back.round) == (state.totals, state.train_flops, 7)
    (path / "state.json").write_text("{")
    with pytest.raises(RunError, match=rf"checkpoint {path} cannot be read .*delete the folder"):
        load(path)


def test_only_complete_checkpoints_count_and_only_the_last_two_are_kept(tmp_path: Path) -> None:
    run = fedray.run([*CELL, "rounds=9", "checkpoint.every=1"], folder=tmp_path / "run")
    (run.folder / "checkpoints" / "tmp-000099-1").mkdir()
    assert [path.name for path in checkpoints(run.folder / "checkpoints")] == ["round-000008", "round-000009"]


def test_an_actor_takes_the_committed_record_and_not_an_older_one() -> None:
    """Two bundles may hold the same client; the version that the driver asks for decides."""
    from fedray.sim.ray_runtime import ClientActor

    class Seen:
        def train(
            self, broadcast: object, clients: object, records: dict[int, Record]
        ) -> tuple[str, dict[int, Record]]:
            self.records = records
            return "reply", {}

    actor = object.__new__(ClientActor)
    actor.worker, actor.records = Seen(), {}  # type: ignore[assignment]
    old, new = (Record(memories=(value,), known=None) for value in (1, 2))
    broadcast = type("B", (), {"round": 9})()
    actor.train(broadcast, [4], [7], (5, {4: old}), (7, {4: new}))
    assert actor.worker.records == {4: new}  # type: ignore[attr-defined]
