"""A short version of a policy: its schedule moved into a run of a few rounds, everything else as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from fedray.errors import ConfigError
from fedray.round import FieldError, Policy
from fedray.testing.wrap import setting_names

ROUNDS = 6
"""Of a run for a check: masks move and rest, a schedule ends, and half of it is a run of its own."""

P = TypeVar("P", bound=Policy[Any, Any])

SHORT: Mapping[str, Callable[[int], int]] = {
    # An event in every second round, so that there are rounds of both kinds.
    "every": lambda value: min(value, 2),
    # What begins later than round 2 begins in round 2; 0 is before the first round and stays.
    "start": lambda value: min(value, 2),
    "round": lambda value: min(value, 2),
    "rounds": lambda value: min(value, 2),
    # What ends, ends before the last round, so that what comes after the end is seen; 0 is never, and stays.
    "finish": lambda value: min(value, ROUNDS - 1),
    "until": lambda value: min(value, ROUNDS - 1),
    "end": lambda value: min(value, ROUNDS - 1),
}
"""How fields that are whole numbers of rounds are moved, by a word of their name: `every` and `initial_every` alike."""
ENDS = ("finish", "until", "end")
"""They win over other words of a name: `end_round` is an end."""


def shorten(policy: P, *, keeping: Collection[str] = ()) -> P:
    """The policy with its schedule moved into a run of ROUNDS rounds. keeping: settings that stay as they are. Raises
    ConfigError where it refuses that."""
    changed: dict[str, Any] = {}
    for name in setting_names(policy):
        value = getattr(policy, name)
        words = [word for word in name.split("_") if word in SHORT]
        if words and name not in keeping and isinstance(value, int) and not isinstance(value, bool):
            ends = [word for word in words if word in ENDS]
            changed[name] = SHORT[(ends or words)[-1]](value)
    if not changed:
        return policy
    try:
        moved: P = changed_in(policy, **changed)
    except ConfigError as error:
        schedule = ", ".join(f"{name}={value}" for name, value in changed.items())
        why = error.under("pruner") if isinstance(error, FieldError) else error
        raise ConfigError(
            f"in the short run, with {schedule}: {why}; choose others, or leave the schedule as it is by --as-written, "
            "from Python by short=False"
        ) from error
    return moved


def changed_in(policy: Any, **changes: Any) -> Any:
    """The policy with other values of some settings. Raises ConfigError where it refuses them."""
    try:
        return dataclasses.replace(policy, **changes)
    except ConfigError:
        raise
    except Exception as error:
        # Not every class refuses by `refuse`.
        raise ConfigError(f"{type(error).__name__}: {error}") from error
