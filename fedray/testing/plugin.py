"""The plug-in for pytest: `pytest --fedray-check my_pruner.yaml` adds a test for each check.

pytest loads it in every project, so nothing of fedray is imported until the option is given.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fedray", "federated pruning")
    group.addoption(
        "--fedray-check",
        action="append",
        default=[],
        metavar="NAME_OR_FILE",
        help="check that this pruner keeps the laws of a federated round: a yaml file or a name; may be repeated",
    )


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    targets: list[str] = config.getoption("fedray_check")
    if not targets:
        return
    from fedray.errors import ConfigError
    from fedray.testing.conform import CHECKS
    from fedray.testing.load import load
    from fedray.testing.subject import Subject

    for target in targets:
        try:
            subject = Subject(load(target, others=targets))
        except ConfigError as error:
            raise pytest.UsageError(f"--fedray-check {target}: {error}") from error
        items += [
            CheckItem.from_parent(session, name=f"{target}::{check}", subject=subject, check=check) for check in CHECKS
        ]


class CheckItem(pytest.Item):
    """One check of one pruner."""

    def __init__(self, *, subject: Any, check: str, **more: Any) -> None:
        super().__init__(**more)
        self.subject, self.check = subject, check

    def runtest(self) -> None:
        from fedray.testing.conform import law_of, one

        result = one(self.subject, self.check)
        if result.verdict == "skipped":
            pytest.skip(result.sentence)
        if result.verdict == "failed":
            raise _Broken(f"{self.check}: {result.sentence}\nThe law: {law_of(self.check)}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, _Broken):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, self.name


class _Broken(Exception):
    """A law that does not hold; its sentence says all, so no traceback is shown."""
