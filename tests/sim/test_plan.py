"""Laws of the plan: what fits is started, what does not is refused with what is missing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedray.errors import ConfigError
from fedray.sim.plan import ACTOR_BYTES, Cluster, Plan, gpu_processes, make_plan

SMALL = Cluster(cpus=2, gpus=0, memory_bytes=16e9)


def plan(cluster: Cluster = SMALL, **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "num_clients": 100, "cohort": 10, "clients_per_actor": "auto", "slots": "auto", "device": "cpu"
    }  # fmt: skip
    return make_plan(cluster, **{**settings, **changes})


def test_auto_gives_every_client_an_actor_while_there_is_room() -> None:
    assert plan(num_clients=4, cohort=4).actors == 4
    assert plan(Cluster(cpus=128, gpus=0, memory_bytes=500e9), num_clients=400).actors == 400


@pytest.mark.parametrize(("cpus", "memory"), [(2, 500e9), (128, 10e9)])
def test_auto_packs_where_start_up_or_memory_would_not_fit(cpus: float, memory: float) -> None:
    packed = plan(Cluster(cpus=cpus, gpus=0, memory_bytes=memory), num_clients=400)
    assert packed.actors == packed.slots == min(cpus, 10)
    assert packed.actors * packed.clients_per_actor >= 400
    assert "would need 80.0 GB" in packed.forecast


@pytest.mark.parametrize("clients_per_actor", [1, 7, 50, 100, 1000, "auto"])
@pytest.mark.parametrize("cpus", [1, 2, 16])
def test_the_actors_of_a_bundle_and_the_driver_fit_into_it(clients_per_actor: Any, cpus: int) -> None:
    made = plan(Cluster(cpus=cpus, gpus=0, memory_bytes=1e12), num_clients=500, clients_per_actor=clients_per_actor)
    per_bundle = [sum(1 for actor in range(made.actors) if actor % made.slots == b) for b in range(made.slots)]
    assert made.driver_cpus + max(per_bundle) * made.actor_cpus <= made.bundle["CPU"]
    assert made.actor_cpus > 0
    assert made.slots <= cpus
    assert {made.home(client) for client in range(500)} == set(range(made.actors))


def test_no_more_processes_than_memory_admits() -> None:
    room = int(SMALL.memory_bytes * 0.8 // ACTOR_BYTES)
    assert plan(num_clients=room, clients_per_actor=1).actors == room
    with pytest.raises(ConfigError, match=rf"runtime\.clients_per_actor is 1; {room + 1} actors need about"):
        plan(num_clients=room + 1, clients_per_actor=1)


def test_a_gpu_is_shared_by_as_many_processes_as_fit_its_memory() -> None:
    card = 80_000_000_000
    assert gpu_processes(card, 8_000_000_000, cpus_per_gpu=16) == 8
    assert gpu_processes(card, 100_000_000, cpus_per_gpu=16) == 16
    assert gpu_processes(card, 79_000_000_000, cpus_per_gpu=16) == 1
    two = Cluster(cpus=16, gpus=2, memory_bytes=128e9, gpu_bytes=card)
    made = plan(two, cohort=64, device="cuda", client_gpu_bytes=8_000_000_000)
    assert made.slots == 16
    assert made.bundle == {"CPU": 1.0, "GPU": 0.125}
    assert made.actor_gpus == 0.125


def test_one_process_per_gpu_where_fractions_do_not_fit() -> None:
    two = Cluster(cpus=16, gpus=2, memory_bytes=128e9, gpu_bytes=80_000_000_000)
    made = plan(two, device="cuda", client_gpu_bytes=60_000_000_000)
    assert (made.slots, made.actors, made.actor_gpus) == (2, 2, 1.0)


def test_cuda_without_a_gpu_and_slots_beyond_the_cluster_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.device is 'cuda'; this cluster has no GPU"):
        plan(device="cuda")
    with pytest.raises(ConfigError, match=r"runtime\.slots is 3; this cluster has 2 CPUs"):
        plan(slots=3)


@pytest.fixture(scope="module")
def pretended_gpus() -> Iterator[None]:
    import ray

    temp_dir = tempfile.mkdtemp(prefix="fr")  # short enough for sockets
    ray.init(
        num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _temp_dir=temp_dir,
    )  # fmt: skip
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.mark.ray
def test_client_actors_are_spread_over_pretended_gpus_by_fractions(pretended_gpus: None, tmp_path: Path) -> None:
    """Two GPUs that Ray believes in, two processes on each: four actors, two see card 0 and two see card 1."""
    import threading

    import ray
    import ray.cloudpickle as cloudpickle
    from hydra import compose, initialize_config_dir

    from fedray.config import assemble, conf_folder, register
    from fedray.sim import ray_runtime

    register()
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        assembly = assemble(compose("config", overrides=["model.hidden=[8]", "num_clients=8", "cohort=8"]))
    cluster = ray_runtime.look_at_cluster()
    assert cluster.gpus == 2
    from dataclasses import replace

    made = make_plan(
        replace(cluster, gpu_bytes=20_000_000_000, memory_bytes=50e9), num_clients=8, cohort=8, clients_per_actor=2,
        slots="auto", device="cuda", client_gpu_bytes=8_000_000_000,
    )  # fmt: skip
    assert (made.slots, made.actors, made.actor_gpus) == (4, 4, 0.5)
    group = ray_runtime.reserve(made, print)
    runtime = ray_runtime.RayRuntime(
        plan=made, sealed=ray_runtime.Sealed(code=b"", spec=cloudpickle.dumps(assembly.spec)),
        population=ray.put(assembly.population), group=group, seed=0, log_path="", stop=threading.Event(),
    )  # fmt: skip
    runtime.wait_ready()

    def card(actor: Any) -> str:
        return ray.get_runtime_context().get_accelerator_ids()["GPU"][0]

    cards = ray.get([actor.__ray_call__.remote(card) for actor in runtime.actors])
    assert sorted(cards) == ["0", "0", "1", "1"]
