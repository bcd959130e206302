"""Which settings of a policy decide anything: each is given other values, and results are compared."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from fedray.errors import ConfigError, FedrayError
from fedray.round import Policy
from fedray.testing.short import ROUNDS, changed_in
from fedray.testing.subject import Failed
from fedray.testing.wrap import setting_names

Outcome = tuple[Any, ...]
Try = Callable[[Any], Outcome]
"""A policy to the result of its run; raises ConfigError where the run is refused."""

SAME_RESULT = {"shrink": "it decides how fast clients train, not what: see shrunk_is_masked"}
"""Settings that must not change a result."""
RUNNING = {"start": 2, "finish": ROUNDS - 1, "every": 2}
"""A schedule that runs, for a choice that is refused without one."""


@dataclass(kw_only=True)
class Settings:
    """read: decide by themselves. beside: by the name of each that does so only beside another choice, that choice.
    excused: why others are idle. idle: nobody reads them."""

    read: list[str] = field(default_factory=list)
    beside: dict[str, str] = field(default_factory=dict)
    excused: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)


def read_settings(policy: Policy[Any, Any], outcome: Try, *, exempt: Callable[[str], str | None]) -> Settings:
    """Try every field of a policy. exempt: why a field may be idle, None where it may not. Raises Failed where a run
    with another value breaks."""
    found = Settings()
    company: list[tuple[str, str, Any]] = []
    outcome = _telling(policy, outcome)
    for name in setting_names(policy):
        why = SAME_RESULT.get(name) or exempt(name)
        if why is not None:
            found.excused[name] = why
            continue
        values = list(alternatives(policy, name))
        if not values:
            found.excused[name] = "no other value can be derived from its type"
            continue
        decides = _decides(policy, name, values, outcome)
        if decides is None:
            found.excused[name] = "every other value that was tried is refused"
        elif decides:
            found.read.append(name)
        else:
            company = company or _others(policy)
            beside = _beside(company, name, outcome)
            if beside is None:
                found.idle.append(name)
            else:
                found.beside[name] = beside
    return found


def _telling(policy: Policy[Any, Any], outcome: Try) -> Try:
    """The same, and where a run with other settings breaks, the error says with which."""

    def told(other: Any) -> Outcome:
        try:
            return outcome(other)
        except ConfigError:
            raise
        except Exception as error:
            names = [name for name in setting_names(policy) if getattr(other, name) != getattr(policy, name)]
            if not names:
                raise
            words = ", ".join(f"{name}={getattr(other, name)!r}" for name in names)
            # An error of ours says where it happened; of others the type tells what.
            what = str(error) if isinstance(error, FedrayError | Failed) else f"{type(error).__name__}: {error}"
            raise Failed(f"with {words}: {what}") from error

    return told


def alternatives(policy: Any, name: str) -> Iterator[Any]:
    """Other values for a field, by its annotation, those first that are likely to be accepted and to show."""
    value = getattr(policy, name)
    try:
        hint = typing.get_type_hints(type(policy))[name]
    except (NameError, TypeError, KeyError):
        hint = type(value)
    for other in _of(hint, value):
        if type(other) is not type(value) or other != value:
            yield other


def _of(hint: Any, value: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for one in typing.get_args(hint):
            yield from _of(one, value)
    elif typing.get_origin(hint) is Literal:
        yield from typing.get_args(hint)
    elif hint is type(None):
        yield None
    elif hint is bool:
        yield from (True, False)
    elif hint is int:
        whole = value if isinstance(value, int) else 2
        yield from dict.fromkeys((3, 1, whole + 1, whole - 1, 0))
    elif hint is float:
        real = float(value) if isinstance(value, int | float) else 0.5
        yield from dict.fromkeys((real * 0.5, real * 0.1, (real + 1.0) / 2, real * 0.75, real * 2.0, real + 0.25, 0.05))


def _changed(policy: Any, **changes: Any) -> Any | None:
    """The policy with other values; None where it refuses them."""
    try:
        return changed_in(policy, **changes)
    except ConfigError:
        return None


def _running(policy: Any) -> dict[str, int]:
    names = setting_names(policy)
    return {name: number for name, number in RUNNING.items() if name in names}


def _decides(policy: Any, name: str, values: list[Any], outcome: Try, most: int = 99) -> bool | None:
    """Whether any of these values, `most` of those that are accepted, gives another result; None where all are
    refused."""
    tried = 0
    for base in (policy, _changed(policy, **_running(policy))):
        if base is None or tried:
            break
        for value in values:
            if tried == most:
                break
            other = _changed(base, **{name: value})
            if other is None:
                continue
            try:
                result, plain = outcome(other), outcome(base)
            except ConfigError:
                continue
            tried += 1
            if result != plain:
                return True
    return False if tried else None


def _others(policy: Any) -> list[tuple[str, str, Any]]:
    """The policy with another choice in one field: its name, the choice in words, and the policy.

    What needs a running schedule comes first, for most fields that are idle are those of a schedule; other fractions
    come last, for some fields are read only where a bound is reached.
    """
    alone, running, fractions = [], [], []
    for name in setting_names(policy):
        value = getattr(policy, name)
        if isinstance(value, float):
            for choice in list(alternatives(policy, name))[:2]:
                if (other := _changed(policy, **{name: choice})) is not None:
                    fractions.append((name, f"{name}={choice:g}", other))
            continue
        number = isinstance(value, int) and not isinstance(value, bool)
        for choice in [one for one in alternatives(policy, name) if one is None or not number]:
            if (other := _changed(policy, **{name: choice})) is not None:
                alone.append((name, f"{name}={choice}", other))
            elif (other := _changed(policy, **_running(policy) | {name: choice})) is not None:
                running.append((name, f"{name}={choice}", other))
    return running + alone + fractions


def _beside(company: list[tuple[str, str, Any]], name: str, outcome: Try) -> str | None:
    """The first other choice beside which a field decides something."""
    for whose, words, policy in company:
        if whose != name and _decides(policy, name, list(alternatives(policy, name)), outcome, most=3):
            return words
    return None
