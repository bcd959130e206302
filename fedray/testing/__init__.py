"""Conformance: does a pruner, ours or anybody's, keep the laws of a federated round?

    fedray check my_pruner.yaml                     # a table, on the command line
    test_mine = conformance(Mine(sparsity=0.8))     # one test for each check, in a file of tests
    pytest --fedray-check my_pruner.yaml            # the same without a file

The checks are in `fedray.testing.laws`, one function each, whose docstring states the law; docs/conformance.md has all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray.testing.conform import CHECKS, Result, assert_conforms, check, conformance
    from fedray.testing.short import ROUNDS, shorten

__all__ = ["CHECKS", "ROUNDS", "Result", "assert_conforms", "check", "conformance", "shorten"]


def __getattr__(name: str) -> Any:
    # pytest imports the plug-in beside this file in every project: nothing heavy is loaded until it is asked for.
    if name in ("CHECKS", "Result", "assert_conforms", "check", "conformance"):
        import fedray.testing.conform

        return getattr(fedray.testing.conform, name)
    if name in ("ROUNDS", "shorten"):
        import fedray.testing.short

        return getattr(fedray.testing.short, name)
    raise AttributeError(f"module 'fedray.testing' has no attribute {name!r}")
