"""How many processes, where, and what they will cost: a pure function of the cluster and the request."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fedray.errors import ConfigError

ACTOR_BYTES = 200_000_000
"""Memory of one more client process with torch loaded, beside the data that all share (measured: 170 to 200 MB)."""
ACTOR_CPU_SECONDS = 2.4
"""CPU time to start one: the interpreter, torch, the model."""
STARTUP_SECONDS = 8.0
"""What `auto` may spend on starting clients as actors of their own; beyond it packs them."""
GPU_CONTEXT_BYTES = 600_000_000
"""What a CUDA context costs each process on the card, beside what its client allocates."""
MEMORY_SHARE = 0.8
"""Of the memory that the cluster reports as free for actors, how much a run may plan with."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run may use. memory_bytes: for actors. gpu_bytes: of the smallest GPU; 0 without one."""

    cpus: float
    gpus: float
    memory_bytes: float
    gpu_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """slots: calls in flight at a time, one placement-group bundle each. actors: client processes.

    clients_per_actor: most clients in one actor. actor_cpus, actor_gpus: the share of its bundle that each actor takes.
    bundle: the resources of one slot. driver_cpus, driver_gpus: the driver's share of the first bundle.
    Without actors the clients live in the driver's process.
    """

    slots: int
    actors: int
    clients_per_actor: int
    actor_cpus: float
    actor_gpus: float
    driver_cpus: float
    bundle: dict[str, float]
    device: Literal["cpu", "cuda"]
    forecast: str
    driver_gpus: float = 0.0

    @property
    def shape(self) -> tuple[Any, ...]:
        """What processes must agree in to take over from each other."""
        shares = (self.actor_cpus, self.actor_gpus, self.driver_cpus, self.driver_gpus)
        return (self.slots, self.actors, self.device, shares, tuple(sorted(self.bundle.items())))

    def home(self, client: int) -> int:
        """The actor in which a client lives at first; neighbours are dealt out, not lumped."""
        return client % self.actors


def make_plan(
    cluster: Cluster,
    *,
    num_clients: int,
    cohort: int,
    clients_per_actor: int | Literal["auto"],
    slots: int | Literal["auto"],
    device: Literal["cpu", "cuda"],
    client_gpu_bytes: int = 0,
    sweep: bool = False,
    inline: bool = False,
    warm: int = 0,
) -> Plan:
    """Choose slots and actors. client_gpu_bytes: peak allocation of one client, from a probe; only with cuda.

    sweep: one of many runs, which share the cluster: `auto` is then one slot, and one actor for each slot.
    inline: the clients live in the driver's process, on one slot. warm: client processes that can be borrowed; where
    they suffice for one in each slot, `auto` takes these.
    Raises ConfigError where the request does not fit, saying what is missing.
    """
    if device == "cuda":
        if cluster.gpus < 1:
            raise ConfigError("runtime.device is 'cuda'; this cluster has no GPU. Use runtime.device=auto or cpu")
        per_gpu = gpu_processes(cluster.gpu_bytes, client_gpu_bytes, cluster.cpus / cluster.gpus)
        most = int(cluster.gpus) * per_gpu
    else:
        per_gpu, most = 0, int(cluster.cpus)
    if most < 1:
        raise ConfigError(f"a run needs at least one CPU; this cluster has {cluster.cpus:g}")
    bundle: dict[str, float] = {"CPU": 1.0}
    if device == "cuda":
        bundle["GPU"] = math.floor(1e4 / per_gpu) / 1e4
    if inline:
        return Plan(
            slots=1,
            actors=0,
            clients_per_actor=num_clients,
            actor_cpus=0.0,
            actor_gpus=0.0,
            driver_cpus=1.0,
            driver_gpus=bundle.get("GPU", 0.0),
            bundle=bundle,
            device=device,
            forecast=f"{num_clients} clients in the driver's process ({device})",
        )
    if slots != "auto" and slots > most:
        unit = "GPU shares" if device == "cuda" else "CPUs"
        raise ConfigError(f"runtime.slots is {slots}; this cluster has {most} {unit}. Use runtime.slots=auto")
    if slots == "auto":
        slots = 1 if sweep else most
    num_slots = min(slots, max(cohort, 1))
    room = int(cluster.memory_bytes * MEMORY_SHARE // ACTOR_BYTES)
    start_up = ACTOR_CPU_SECONDS * num_clients / max(cluster.cpus, 1)
    if clients_per_actor == "auto":
        if sweep:
            actors = min(num_slots, num_clients)
            packed, why = math.ceil(num_clients / actors), "in a sweep each slot has one actor"
        elif warm >= min(num_slots, num_clients):
            actors = min(num_slots, num_clients)
            packed, why = math.ceil(num_clients / actors), "each slot borrows a warm process"
        elif num_clients <= room and start_up <= STARTUP_SECONDS:
            actors, packed, why = num_clients, 1, "every client has an actor of its own"
        else:
            actors = min(num_slots, num_clients)
            packed = math.ceil(num_clients / actors)
            why = (
                f"one actor per client would need {num_clients * ACTOR_BYTES / 1e9:.1f} GB and {start_up:.0f} s to "
                f"start, so each slot has one actor with up to {packed} clients"
            )
    else:
        packed, why = min(clients_per_actor, num_clients), f"runtime.clients_per_actor={clients_per_actor}"
        actors = math.ceil(num_clients / packed)
    if actors > max(room, 1):
        raise ConfigError(
            f"runtime.clients_per_actor is {clients_per_actor}; {actors} actors need about "
            f"{actors * ACTOR_BYTES / 1e9:.1f} GB and this cluster has "
            f"{cluster.memory_bytes * MEMORY_SHARE / 1e9:.1f} GB for them. Use "
            f"runtime.clients_per_actor=auto, or {math.ceil(num_clients / max(room, 1))} or more"
        )
    num_slots = min(num_slots, actors)
    per_bundle = math.ceil(actors / num_slots)
    # One part of the bundle more than it has actors: room for the driver. Ray counts in units of 1e-4.
    share = math.floor(1e4 / (per_bundle + 1)) / 1e4
    gpu_share = math.floor(1e4 * bundle["GPU"] / per_bundle) / 1e4 if device == "cuda" else 0.0
    forecast = (
        f"{num_clients} clients in {actors} actor{'s' if actors > 1 else ''} on "
        f"{num_slots} slot{'s' if num_slots > 1 else ''} ({device}): {why}; "
        f"forecast {actors * ACTOR_BYTES / 1e9:.1f} GB, "
        f"{ACTOR_CPU_SECONDS * actors / max(cluster.cpus, 1):.0f} s to start"
    )
    return Plan(
        slots=num_slots,
        actors=actors,
        clients_per_actor=packed,
        actor_cpus=share,
        actor_gpus=gpu_share,
        driver_cpus=share,
        bundle=bundle,
        device=device,
        forecast=forecast,
    )


def gpu_processes(gpu_bytes: int, client_bytes: int, cpus_per_gpu: float) -> int:
    """How many client processes share one GPU: as fit in its memory, no more than it has CPUs, at least one."""
    if not gpu_bytes or not client_bytes:
        return 1
    fitting = int(gpu_bytes * 0.9 // (client_bytes + GPU_CONTEXT_BYTES))
    return max(1, min(fitting, int(cpus_per_gpu)))
