"""A policy with something around its hooks: what it was asked and what it answered, or every question twice."""

from __future__ import annotations

import dataclasses
import functools
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
    and only hooks that the class has of its own are replaced (or those in `hooks`): both are looked at in a run.
    It holds everything that the policy holds, also what was derived from its fields."""
    kind = type(policy)
    wanted = [h for h in HOOKS if getattr(kind, h) is not getattr(Policy, h)] if hooks is None else hooks
    replaced: dict[str, Any] = {hook: _replaced(kind, hook, around) for hook in wanted}
    wrapped: Policy[Any, Any] = object.__new__(type(f"Wrapped{kind.__name__}", (kind,), replaced))
    for name, value in held_by(policy).items():
        object.__setattr__(wrapped, name, value)
    return wrapped


def setting_names(policy: Any) -> tuple[str, ...]:
    """The names of a policy's settings: fields that are given when it is made; none where it is no dataclass."""
    if not dataclasses.is_dataclass(policy):
        return ()
    return tuple(one.name for one in dataclasses.fields(policy) if one.init)


def held_by(policy: Any) -> dict[str, Any]:
    """What an instance holds by name: fields, what was derived from them, and whatever was put there since."""
    held = dict(getattr(policy, "__dict__", {}))
    for kind in type(policy).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            # A private name is kept under that of its class.
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if name not in ("__dict__", "__weakref__") and hasattr(policy, name):
                held[name] = getattr(policy, name)
    return held


def identity(policy: Any) -> str:
    """What tells two policies apart: their type and all that they hold, whatever they print."""
    kind = type(policy)
    return f"{kind.__module__}.{kind.__qualname__}: {fingerprint(held_by(policy))!r}"


def written_to(policy: Any) -> dict[str, Any]:
    """Everything of a policy that a hook could write to, as bits: what it holds and what its classes hold. A value
    that functools.cached_property keeps is no news."""
    found = {name: fingerprint(value) for name, value in held_by(policy).items() if not _is_cached(policy, name)}
    for kind in type(policy).__mro__:
        if kind not in Policy.__mro__:
            mine = {name: value for name, value in vars(kind).items() if not name.startswith("__")}
            found |= {
                f"{kind.__name__}.{name}": fingerprint(value)
                for name, value in mine.items()
                if not callable(value) and not hasattr(value, "__get__") and not name.startswith("_abc_")
            }
    return found


def _is_cached(policy: Any, name: str) -> bool:
    return isinstance(getattr(type(policy), name, None), functools.cached_property)


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
