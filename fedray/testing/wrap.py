"""A policy with something around its hooks: what it was asked and what it answered, or every question twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from fedray.round import Policy
from fedray.testing.compare import fingerprint

HOOKS = (
    "keeps", "parts", "exchange_parts", "init_server", "init_client", "send", "begin", "end", "settle",
    "exchanges", "ask", "answer", "learn", "view",
)  # fmt: skip
Around = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]
"""(name of the hook, the hook, its arguments) to its answer."""


def wrap(policy: Policy[Any, Any], around: Around, hooks: Sequence[str] | None = None) -> Policy[Any, Any]:
    """The same policy with `around` called in the place of its hooks. It is an instance of the policy's own class,
    and only hooks that the class has of its own are replaced (or those in `hooks`): both are looked at in a run."""
    kind = type(policy)
    wanted = [h for h in HOOKS if getattr(kind, h) is not getattr(Policy, h)] if hooks is None else hooks
    made = type(f"Wrapped{kind.__name__}", (kind,), {hook: _replaced(kind, hook, around) for hook in wanted})
    wrapped: Policy[Any, Any] = object.__new__(made)
    for name in setting_names(policy):
        object.__setattr__(wrapped, name, getattr(policy, name))
    return wrapped


def setting_names(policy: Any) -> tuple[str, ...]:
    """The names of a policy's fields; none where it is no dataclass."""
    return tuple(one.name for one in dataclasses.fields(policy)) if dataclasses.is_dataclass(policy) else ()


def _replaced(kind: type, hook: str, around: Around) -> Callable[..., Any]:
    original = getattr(kind, hook)

    def replaced(self: Any, *arguments: Any) -> Any:
        return around(hook, lambda *given: original(self, *given), arguments)

    return replaced


class Impure(Exception):
    """A hook wrote to its inputs or answered differently the second time."""


def twice(called: list[str]) -> Around:
    """Asks every question twice, and compares answers and inputs. called: takes the names of hooks. Raises Impure."""

    def ask(hook: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        before = fingerprint(arguments)
        first = call(*arguments)
        frozen = fingerprint(first)
        if fingerprint(arguments) != before:
            raise Impure(f"{hook} writes to its inputs")
        second = call(*arguments)
        if fingerprint(arguments) != before:
            raise Impure(f"{hook} writes to its inputs")
        if fingerprint(second) != frozen:
            raise Impure(f"{hook} answers differently when it is asked again")
        if fingerprint(first) != frozen:
            raise Impure(f"{hook} changes its first answer when it is asked again")
        called.append(hook)
        return second

    return ask
