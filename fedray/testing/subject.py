"""What is checked: a policy in a tiny federation, with its runs kept so that checks share them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, NoReturn

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import BatchNormCNN, Task
from fedray.round import Optim, Policy
from fedray.sim.population import Population
from fedray.sim.spec import EvalSpec, RunSpec
from fedray.strategies import FedAvg
from fedray.testing.federation import Ran, Upload, accept, run, run_spec, synthetic
from fedray.testing.short import ROUNDS
from fedray.testing.wrap import identity
from fedray.tree import Tree

SHAPE, CLASSES, WIDTH = (2, 8, 8), 4, 4
# 488 prunable weights: a fifth, a tenth or a half of them is rounded up and down to different numbers, or is whole.
SIZES = (12, 5, 9, 4, 16, 7)  # one client has less than two batches
HELD, PUBLIC = 4, 16
COHORT = 4
MOMENTUM = Optim(momentum=0.9, weight_decay=0.01)
"""They leak first where a mask does."""


class Failed(Exception):
    """A law does not hold; the sentence names round, client and tensor as far as there are such."""


class Skipped(Exception):
    """A law does not apply; the sentence says why."""


@lru_cache
def clients(sizes: tuple[int, ...] = SIZES, alike: bool = False) -> Population:
    """Clients with small images, a validation split each, and public data at the server."""
    return synthetic(
        SHAPE,
        sizes=sizes,
        num_classes=CLASSES,
        key=Key.of(7).fold("conformance"),
        num_test=16,
        held=HELD,
        public=PUBLIC,
        alike=alike,
    )


@dataclass(eq=False)
class Subject:
    """policy: its short version, see `testing.short`. No run sees it: each has a copy of its own, so that nothing goes
    from one run to another by way of the policy."""

    policy: Policy[Any, Any]
    _runs: dict[str, Ran] = field(default_factory=dict)

    def spec(self, *policies: Policy[Any, Any], **changes: Any) -> RunSpec:
        """A run of copies of these policies; without any, of the one that is checked, with FedAvg."""
        onion = [copied(policy) for policy in policies or (self.policy, FedAvg())]
        named = [("pruner", onion[0]), *((type(policy).__name__.lower(), policy) for policy in onion[1:])]
        facts: dict[str, Any] = {
            "rounds": ROUNDS,
            "cohort": COHORT,
            "num_clients": len(SIZES),
            # Some methods compare the first epoch with the last.
            "epochs": 2,
            "optim": MOMENTUM,
            "validation": 0.25,
            "public": PUBLIC,
            # Clients' own models are scored one by one, so that what only they show is seen.
            "evaluation": EvalSpec(every=2, clients="cohort", batch_size=32),
        }
        task = Task(build=partial(BatchNormCNN, shape=SHAPE, num_classes=CLASSES, width=WIDTH))
        return run_spec(named, task, **facts | changes)

    def run(self, *policies: Policy[Any, Any], **changes: Any) -> Ran:
        """That run, done once. Raises ConfigError where a policy refuses it."""
        name = repr(([identity(policy) for policy in policies], sorted(changes.items())))
        if name not in self._runs:
            spec = self.spec(*policies, **changes)
            accept(spec)
            self._runs[name] = run(spec, clients())
        return self._runs[name]

    @cached_property
    def ran(self) -> Ran:
        """The run that most checks look at: FedAvg, local momentum and weight decay."""
        return self.run()

    @property
    def like(self) -> Tree:
        return self.ran.driver.worker.origin

    @property
    def prunable(self) -> tuple[str, ...]:
        return self.ran.driver.worker.prunable

    def changes(self, round: int) -> bool | None:
        return self.policy.changes_masks(round)

    def reason_without(self, check: str) -> str | None:
        """Why the policy says that a law does not apply to it; None where it says nothing."""
        return self.policy.exempt.get(check)


def copied(policy: Policy[Any, Any]) -> Policy[Any, Any]:
    """Another instance that holds the same. Raises Failed where it cannot be copied, as to an actor."""
    try:
        return copy.deepcopy(policy)
    except Exception as error:
        raise Failed(f"the policy itself cannot be copied: {type(error).__name__}: {error}") from error


def by_client(uploads: Iterable[Upload]) -> dict[int, list[Upload]]:
    """Uploads of each client, by round."""
    found: dict[int, list[Upload]] = {}
    for upload in sorted(uploads, key=lambda upload: upload.round):
        found.setdefault(upload.client, []).append(upload)
    return found


def refused(error: ConfigError) -> NoReturn:
    raise Failed(f"the run is refused: {error}; fedray check FILE key=value sets what a short run needs") from error
