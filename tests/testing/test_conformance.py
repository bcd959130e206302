"""Every pruner of conf/pruner keeps every law that applies to it, and which do not apply is no accident."""

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

WIDTHS = {"fedrolex", "fjord", "heterofl"}
UNITS = {*WIDTHS, "hybrid", "structured", "subfedavg_hybrid"}
# What does not apply to whom; all other pairs must be checked. A pruner that is new stands here only with a reason.
SKIPPED = {
    # Clients have masks of their own, or the size is an outcome.
    "budget_met": {*WIDTHS, "lotteryfl", "subfedavg", "subfedavg_hybrid", "prunefl", "structured"},
    # Others let come back what they cut.
    "regrown_starts_as_declared": set(PRUNERS) - {"feddst", "fedtiny", "prunefl", "rigl", "set"},
    # There is no such setting; and one whose other settings cut as well.
    "sparsity_zero_is_fedavg": {*WIDTHS, "none", "prunefl", "threshold", "subfedavg_hybrid"},
    # Each client has its own width by design.
    "identical_clients_are_one": WIDTHS,
    "shrunk_is_masked": set(PRUNERS) - UNITS,
    # There is no setting.
    "settings_are_read": {"none"},
}


@lru_cache(maxsize=2)  # checks of one pruner share its runs, and come one after the other
def subject(pruner):
    return Subject(load(pruner))


def verdict(pruner, check):
    result = one(subject(pruner), check)
    expected = "skipped" if pruner in SKIPPED.get(check, ()) else "passed"
    assert result.verdict == expected, f"{result.sentence}\n{law_of(check)}"


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_pruner_does_what_it_says_in_a_short_run(pruner):
    for check in ONE_RUN:
        verdict(pruner, check)


@pytest.mark.full
@pytest.mark.parametrize("check", [check for check in CHECKS if check not in ONE_RUN])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_pruner_keeps_the_law(pruner, check):
    verdict(pruner, check)


def test_every_check_states_a_law_and_is_in_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    for name in CHECKS:
        assert len(law_of(name)) > 40
        assert f"`{name}`" in text, name
