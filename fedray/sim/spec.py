"""Everything that a run is, as plain frozen values. Actors get this and the population, and never see Hydra."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fedray.costs import Device, Link
from fedray.keys import Key
from fedray.models import Task
from fedray.round import Optim, Policy, RunFacts
from fedray.sim.goals import Goals
from fedray.sim.sampling import Always, Availability, Sampler, Uniform
from fedray.train import LearningRate
from fedray.train.engine import EngineKind
from fedray.wire import Wire


@dataclass(frozen=True, kw_only=True)
class TrainerSpec:
    """Local training. Exactly one of epochs and steps is set. batch_size in examples."""

    learning_rate: LearningRate
    batch_size: int
    epochs: int | None
    steps: int | None
    optim: Optim
    engine: EngineKind

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps of a client with this many examples; the last batch of an epoch may be smaller."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * math.ceil(num_examples / self.batch_size)


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """every: rounds between evaluations; 0 for none at all. clients: whose local tests are reported."""

    every: int
    clients: Literal["cohort", "all"] | int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run.

    checkpoint_every: rounds between checkpoints; 0 for none.
    policies: (name, policy), inner to outer. wire: how messages are written.
    device: where training runs. hardware, link: what clients are imagined to have, for simulated time and energy.
    server_rate: factor on the strategies' own rates. sampler, availability: who takes part in a round.
    validation: share of each client's training data that is set apart for gates. public: training examples that the
    server has to itself. goals: targets and early stopping.
    initial_mask: what the model that the run starts from has lost, bool by tensor; None for nothing.
    config: the whole resolved configuration, nested, for records; nothing is read from it.
    """

    run_id: str
    name: str
    seed: int
    rounds: int
    num_clients: int
    cohort: int
    task: Task
    policies: tuple[tuple[str, Policy[Any, Any]], ...]
    wire: Wire
    trainer: TrainerSpec
    evaluation: EvalSpec
    server_rate: LearningRate = field(default_factory=lambda: LearningRate(lr=1.0))
    sampler: Sampler = field(default_factory=Uniform)
    availability: Availability = field(default_factory=Always)
    validation: float = 0.0
    public: int = 0
    goals: Goals = field(default_factory=Goals)
    initial_mask: Mapping[str, Tensor] | None = None
    checkpoint_every: int = 0
    device: str = "cpu"
    hardware: Device | None = None
    link: Link | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> Key:
        return Key.of(self.seed)

    def download_key(self, round: int) -> Key:
        """What the downloads of a round draw from; one for all clients, so that equal messages are equal bytes."""
        return self.key.fold("round", round, "wire")

    def facts(self) -> RunFacts:
        """What policies may look at when they refuse bad company."""
        return RunFacts(
            rounds=self.rounds,
            num_clients=self.num_clients,
            cohort=self.cohort,
            optim=self.trainer.optim,
            epochs=self.trainer.epochs,
            steps=self.trainer.steps,
            policies=self.policies,
            validation=self.validation,
            public=self.public,
        )

    def sample_cohort(self, round: int, sizes: np.ndarray) -> tuple[int, ...]:
        """The clients of a round, sorted; a function of the seed and the round. sizes: examples of every client."""
        here = np.flatnonzero(self.availability(round=round, num_clients=self.num_clients, key=self.key))
        chosen = self.sampler(here, cohort=self.cohort, sizes=sizes, round=round, key=self.key)
        return tuple(sorted(int(client) for client in chosen))
