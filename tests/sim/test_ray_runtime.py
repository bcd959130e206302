"""Laws of the Ray runtime: the same bits whatever the packing, the order and the deaths; nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import fedray
from fedray.errors import ClientError, ConfigError, NumericError
from fedray.track.store import read_rows, read_transfers

pytestmark = pytest.mark.ray

PLAIN = [
    "data=digits",
    "model.hidden=[16]",
    "num_clients=16",
    "cohort=8",
    "rounds=4",
    "trainer.batch_size=10",
    "tracker.progress=none",
    "tracker.wandb.mode=disabled",
]
CELL = [*PLAIN, "pruner=feddst", "pruner.every=2", "pruner.until=4"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    temp_dir = tempfile.mkdtemp(prefix="fr")  # short enough for sockets
    ray.init(
        num_cpus=2, include_dashboard=True, dashboard_port=0, log_to_driver=False, logging_level="ERROR",
        _temp_dir=temp_dir,
    )  # fmt: skip
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


def digests(run: fedray.Run) -> list[str]:
    return [row["digest"] for row in run.rows]


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> fedray.Run:
    return fedray.run([*CELL, "runtime=inline"], folder=tmp_path_factory.mktemp("inline") / "run")


def client_actors() -> list[dict[str, Any]]:
    """Living client actors, as Ray's state API lists them."""
    from ray.util.state import list_actors

    # Other clusters may run on this machine.
    rows = list_actors(
        address=ray.get_runtime_context().gcs_address,
        filters=[("class_name", "=", "ClientActor"), ("state", "!=", "DEAD")],
        limit=1000,
        detail=True,
    )
    return [row if isinstance(row, dict) else vars(row) for row in rows]


def nothing_is_left() -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        from ray.util.state import list_actors

        living = list_actors(address=ray.get_runtime_context().gcs_address, filters=[("state", "!=", "DEAD")])
        if not living and ray.available_resources().get("CPU") == 2.0:
            return True
        time.sleep(0.5)
    return False


@pytest.mark.parametrize("packing", ["4", "8", "16"])
def test_packing_does_not_change_a_bit(cluster: None, inline: fedray.Run, tmp_path: Path, packing: str) -> None:
    run = fedray.run([*CELL, f"runtime.clients_per_actor={packing}"], folder=tmp_path / "run")
    assert digests(run) == digests(inline)
    assert read_transfers(run.folder) == read_transfers(inline.folder)


def test_clients_own_models_and_statistics_are_the_same_wherever_they_live(cluster: None, tmp_path: Path) -> None:
    cell = [
        *(o for o in PLAIN if not o.startswith(("model", "num_clients", "cohort"))),
        "num_clients=6",
        "cohort=3",
        "eval.clients=all",
        "model=batchnorm_cnn",
        "model.width=4",
        "batch_norm=static",
        "personal=ditto",
        "correction=scaffold",
        "availability=dropout",
    ]
    one = fedray.run([*cell, "runtime=inline"], folder=tmp_path / "inline")
    two = fedray.run([*cell, "runtime.clients_per_actor=2"], folder=tmp_path / "ray")
    assert digests(one) == digests(two)
    names = ("test/accuracy", "test/loss", "client/accuracy_mean", "client/global_accuracy_p10", "wire/total_bytes")
    for a, b in zip(one.rows, two.rows, strict=True):
        assert [a.get(name) for name in names] == [b.get(name) for name in names]
    assert one.final["client/accuracy_mean"] != one.final["client/global_accuracy_mean"]
    assert read_transfers(one.folder) == read_transfers(two.folder)


def test_every_client_is_an_actor_of_its_own_and_gives_the_same_bits(
    cluster: None, inline: fedray.Run, tmp_path: Path
) -> None:
    seen: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(len([actor for actor in client_actors() if actor["state"] == "ALIVE"]))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run = fedray.run([*CELL, "runtime.clients_per_actor=1", "rounds=30"], folder=tmp_path / "run")
    stop.set()
    watcher.join()
    assert digests(run)[:4] == digests(inline)
    assert max(seen) == 16
    assert nothing_is_left()


@pytest.mark.parametrize("wire", ["float32", "stc"])  # the second keeps residuals and a version at each client
def test_a_killed_actor_changes_no_bit_and_loses_no_record(cluster: None, wire: str, tmp_path: Path) -> None:
    """`kill -9` on both client processes, again and again but fewer than three times a client, in mid-round."""
    long = [*CELL, "rounds=40", "trainer.epochs=20", f"wire={wire}"]
    calm = fedray.run([*long, "runtime=inline"], folder=tmp_path / "calm")
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while not done.is_set() and not (tmp_path / "run" / "rounds.jsonl").is_file():
            time.sleep(0.05)
        while not done.is_set() and len(read_rows(tmp_path / "run")) < 5:
            time.sleep(0.05)
        for actor in client_actors():
            if actor["state"] == "ALIVE" and not done.is_set():
                os.kill(actor["pid"], signal.SIGKILL)
                killed.append(actor["pid"])

    killer = threading.Thread(target=kill)
    killer.start()
    run = fedray.run([*long, "runtime.clients_per_actor=8"], folder=tmp_path / "run")
    done.set()
    killer.join()
    assert len(killed) == 2
    assert digests(run) == digests(calm)
    assert [row["wire/total_bytes"] for row in run.rows] == [row["wire/total_bytes"] for row in calm.rows]
    assert "died" in (run.folder / "log.txt").read_text()


def test_three_deaths_of_a_client_end_the_run_and_name_it(cluster: None, tmp_path: Path) -> None:
    source = tmp_path / "code"
    source.mkdir()
    (source / "deadly.py").write_text(
        "import os, signal\n"
        "from dataclasses import dataclass\n"
        "from fedray.round import Policy\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Deadly(Policy):\n"
        "    def end(self, fit, message, memory, ctx):\n"
        "        if ctx.client.id == 5 and ctx.round >= 2:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return fit, message, memory\n"
    )
    with pytest.raises(ClientError, match=r"client 5 lost its actor 3 times .*seed 0.*log\.txt"):
        fedray.run(
            [*PLAIN, "cohort=16", "+correction.deadly._target_=deadly.Deadly", "runtime.clients_per_actor=8"],
            config_dir=source,
            folder=tmp_path / "run",
        )
    (row,) = read_rows(tmp_path / "run")  # the round before the fatal one, evaluation and all
    assert row["test/accuracy"] > 0
    assert nothing_is_left()


def test_a_diverging_run_names_client_part_and_tensor(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match=r"client \d+ in round 1 .*part 'delta', tensor 'layers"):
        fedray.run([*PLAIN, "trainer.lr=1e20"], folder=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
    assert nothing_is_left()


def test_more_actors_than_fit_are_refused(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.clients_per_actor is 1; 1000 actors need about 200\.0 GB"):
        fedray.run(
            [
                "data=digits",
                "num_clients=1000",
                "partition=iid",
                "runtime.clients_per_actor=1",
                "tracker.progress=none",
            ],
            folder=tmp_path / "run",
        )


def test_more_slots_than_cpus_are_refused(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.slots is 64; this cluster has 2 CPUs"):
        fedray.run([*CELL, "runtime.slots=64"], folder=tmp_path / "run")


def test_code_beside_the_users_yaml_is_importable_in_actors(cluster: None, tmp_path: Path) -> None:
    """The pruner imports a sibling module lazily, inside a hook, where only the actor's own path can help."""
    source = tmp_path / "mine"
    (source / "pruner").mkdir(parents=True)
    (source / "pruner" / "half.yaml").write_text("_target_: half_pruner.Half\nfraction: 0.5\n")
    (source / "half_helper.py").write_text("MARK = 1\n")
    (source / "half_pruner.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedray.prune.allocate import uniform\n"
        "from fedray.prune.score import magnitude\n"
        "from fedray.prune.select import keep_top\n"
        "from fedray.round import Policy\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Half(Policy):\n"
        "    fraction: float\n"
        "    def init_server(self, server, ctx):\n"
        "        counts = uniform(server.params.layout, ctx.prunable, self.fraction)\n"
        "        return server.cut(keep_top(magnitude(server.params), counts, names=ctx.prunable)), None\n"
        "    def end(self, fit, message, memory, ctx):\n"
        "        import half_helper\n"
        "        assert half_helper.MARK == 1\n"
        "        return fit, message, memory\n"
    )
    run = fedray.run([*PLAIN, "pruner=half"], config_dir=source, folder=tmp_path / "run")
    assert run.final["model/sparsity"] == pytest.approx(0.5, abs=1e-3)


class Fatal:
    """Whoever loads this is gone."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_process_that_is_back_hosts_the_run_again_before_anything_is_sent_to_it(cluster: None) -> None:
    """Also where the work that it died under was given up: the evaluation of the round before still has to be done."""
    import ray.cloudpickle as cloudpickle
    from hydra import compose, initialize_config_dir
    from ray.exceptions import RayError

    from fedray.config import assemble, conf_folder, register
    from fedray.sim import ray_runtime
    from fedray.sim.client import Worker
    from fedray.sim.driver import Driver
    from fedray.sim.plan import make_plan
    from fedray.sim.runtime import EvalWork

    register()
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        made = assemble(compose("config", overrides=PLAIN))
    plan = make_plan(
        ray_runtime.look_at_cluster(), num_clients=16, cohort=8, clients_per_actor=16, slots=1, device="cpu",
        client_gpu_bytes=0,
    )  # fmt: skip
    group = ray_runtime.reserve(plan, print)
    runtime = ray_runtime.RayRuntime(
        plan=plan, sealed=ray_runtime.Sealed(code=b"", spec=cloudpickle.dumps(made.spec)),
        population=ray.put(made.population), group=group, seed=0, log_path="", stop=threading.Event(),
    )  # fmt: skip
    try:
        runtime.wait_ready()
        server = Driver(made.spec, made.population, runtime, Worker(made.spec, made.population), None).server
        work = [EvalWork(handle=runtime.put(server), start=0, stop=100, batch_size=50, tag="test")]
        (before,) = runtime.start(None, (), work)
        (actor,) = runtime.actors
        first = ray.get(actor.process.remote())
        runtime.deaths = {0: 2}
        with pytest.raises(ClientError, match="client 0 lost its actor 3 times"):
            list(runtime.start(ray.put(Fatal()), [(0, 1.0)], []))
        deadline = time.monotonic() + 60
        second = first
        while second == first and time.monotonic() < deadline:
            try:
                second = ray.get(actor.process.remote())
            except RayError:
                time.sleep(0.1)
        assert second != first
        (after,) = runtime.start(None, (), work)
        assert {name: list(values) for name, values in after.scores.items()} == {
            name: list(values) for name, values in before.scores.items()
        }
    finally:
        for actor in runtime.actors:
            ray.kill(actor)
        ray_runtime.give_up(group)
