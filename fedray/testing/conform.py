"""All checks of one policy: as results, as one exception, or as a test for pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedray.errors import ConfigError, FedrayError
from fedray.round import Policy
from fedray.testing.laws import CHECKS
from fedray.testing.short import shorten
from fedray.testing.subject import Failed, Skipped, Subject

__all__ = ["CHECKS", "Result", "assert_conforms", "check", "conformance", "law_of"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one check, and a sentence about it."""

    check: str
    verdict: Literal["passed", "failed", "skipped"]
    sentence: str


def law_of(check: str) -> str:
    """The law that a check states, on one line."""
    return " ".join((CHECKS[check].__doc__ or "").split())


def check(policy: Policy[Any, Any], *, only: Iterable[str] | None = None, short: bool = True) -> Iterator[Result]:
    """Check a policy, check by check. only: names of checks; all without. short: whether its schedule is moved into a
    short run first, see `testing.short`. Raises ConfigError for a check that does not exist, or where the short
    version is refused."""
    names = _wanted(only)
    subject = Subject(shorten(policy) if short else policy)
    for name in names:
        yield one(subject, name)


def _wanted(only: Iterable[str] | None) -> list[str]:
    names = list(CHECKS if only is None else only)
    for name in names:
        if name not in CHECKS:
            raise ConfigError(f"{name!r} is no check; there are {', '.join(CHECKS)}")
    return names


def one(subject: Subject, name: str) -> Result:
    """One check of a subject. Bits depend on the number of threads, so it has one, as an actor has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        why = subject.reason_without(name)
        if why is not None:
            raise Skipped(f"it says that this does not apply: {why}")
        if name != "runs":
            _needs_a_run(subject)
        return Result(check=name, verdict="passed", sentence=CHECKS[name](subject))
    except Skipped as skipped:
        return Result(check=name, verdict="skipped", sentence=str(skipped))
    except Failed as failed:
        return Result(check=name, verdict="failed", sentence=str(failed))
    except FedrayError as error:
        return Result(check=name, verdict="failed", sentence=f"its run ends with an error: {error}")
    except Exception as error:
        return Result(check=name, verdict="failed", sentence=f"its run ends with {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads)


def _needs_a_run(subject: Subject) -> None:
    try:
        _ = subject.ran
    except Exception as error:
        raise Skipped("the run that it looks at does not come to its end: see runs") from error


def assert_conforms(policy: Policy[Any, Any], *, only: Iterable[str] | None = None, short: bool = True) -> None:
    """Raise AssertionError with a line for each check that fails."""
    failed = [result for result in check(policy, only=only, short=short) if result.verdict == "failed"]
    assert not failed, "\n".join(f"{result.check}: {result.sentence}" for result in failed)


def conformance(
    policy: Policy[Any, Any], *, only: Iterable[str] | None = None, short: bool = True
) -> Callable[[str], None]:
    """A test for pytest, with one case for each check: `test_mine = conformance(Mine(sparsity=0.8))`.

    Raises ConfigError for a check that does not exist."""
    import pytest

    subject: list[Subject] = []

    @pytest.mark.parametrize("check", _wanted(only))
    def test_conformance(check: str) -> None:
        if not subject:
            subject.append(Subject(shorten(policy) if short else policy))
        result = one(subject[0], check)
        if result.verdict == "skipped":
            pytest.skip(result.sentence)
        if result.verdict == "failed":
            pytest.fail(f"{check}: {result.sentence}\nThe law: {law_of(check)}", pytrace=False)

    return test_conformance
