"""Every pruner of conf/pruner keeps every law that applies to it."""

from functools import lru_cache
from pathlib import Path

import pytest

from fedray.config import conf_folder
from fedray.testing import CHECKS
from fedray.testing.conform import law_of, one
from fedray.testing.load import load
from fedray.testing.subject import Subject

PRUNERS = sorted(path.stem for path in (Path(conf_folder()) / "pruner").glob("*.yaml"))
ONE_RUN = ("runs", "cuts_what_it_says", "budget_met", "upload_inside_support", "masks_move_and_rest")
"""What one short run tells; the others run again, under other circumstances."""


@lru_cache(maxsize=2)  # checks of one pruner share its runs, and come one after the other
def subject(pruner):
    return Subject(load(pruner))


def verdict(pruner, check):
    result = one(subject(pruner), check)
    assert result.verdict != "failed", f"{result.sentence}\n{law_of(check)}"
    return result


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_pruner_does_what_it_says_in_a_short_run(pruner):
    for check in ONE_RUN:
        verdict(pruner, check)


@pytest.mark.full
@pytest.mark.parametrize("check", [check for check in CHECKS if check not in ONE_RUN])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_pruner_keeps_the_law(pruner, check):
    result = verdict(pruner, check)
    if result.verdict == "skipped":
        pytest.skip(result.sentence)


def test_every_check_states_a_law_and_is_in_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    for name in CHECKS:
        assert len(law_of(name)) > 40
        assert f"`{name}`" in text, name
