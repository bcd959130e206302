"""`fedray check` and the plug-in for pytest: what they print, and how they end."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedray.cli import main
from fedray.pruners import FedDST, Magnitude
from fedray.round import Policy
from fedray.testing import ROUNDS, shorten
from fedray.testing.load import load
from fedray.testing.settings import alternatives

HERE = Path(__file__).parent
YAML = "_target_: broken_pruners.{}\n"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A maker of yaml files for the pruners of this folder, beside a copy of their code."""
    (tmp_path / "broken_pruners.py").write_text((HERE / "broken_pruners.py").read_text())
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name):
        path = tmp_path / f"{name.lower()}.yaml"
        path.write_text(YAML.format(name))
        return str(path)

    return write


def test_a_sound_pruner_ends_with_zero_and_a_broken_one_with_one_and_its_sentence(written, capsys):
    assert main(["check", written("Sound"), "--only", "runs,budget_met"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("Sound(sparsity=0.8)")
    assert [line.split()[:2] for line in out[1:]] == [["passed", "runs"], ["passed", "budget_met"]]
    broken = written("MissesBudget")
    assert main(["check", "none", broken, "--only", "budget_met"]) == 1
    seen = capsys.readouterr()
    assert "  failed   budget_met" in seen.out
    assert "none: NoPruning()" in seen.out
    assert seen.err == f"fedray: 1 check failed: {broken}: budget_met\n"


def test_settings_stand_among_the_names_and_are_checked(capsys):
    assert main(["check", "magnitude", "sparsity=0.3", "pruner.start=1", "--only", "runs,budget_met"]) == 0
    out = capsys.readouterr().out
    assert "sparsity=0.3" in out
    assert "start=1" in out
    for words, sentence in (
        (["magnitude", "sparsty=0.3"], "pruner.sparsty is not a setting of Magnitude; did you mean pruner.sparsity?"),
        (["magnitude", "sparsity=two"], "pruner.sparsity is 'two'; it must be a number"),
        (["magnitude", "sparsity=1.5"], "pruner.sparsity is 1.5; it is 0 to below 1"),
        (["magnitude", "--only", "budget"], "'budget' is no check; there are runs, "),
        (["nosuch"], "pruner 'nosuch' does not exist; name a yaml file, or one of "),
        (["no/such.yaml"], "no/such.yaml does not exist; name a yaml file"),
        ([], "fedray check: name a pruner, as in fedray check magnitude"),
    ):
        assert main(["check", *words]) == 2
        assert sentence in capsys.readouterr().err


def test_a_yaml_without_a_policy_is_refused_by_name(tmp_path, capsys):
    for text, sentence in (
        ("sparsity: 0.5\n", "pruner names no _target_"),
        ("_target_: fedray.keys.Key.of\nseed: 1\n", "makes a Key; it must be a fedray.round.Policy"),
        ("_target_: nowhere.Pruner\n", "it cannot be imported"),
        ("a: [\n", "cannot be read"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        assert main(["check", str(tmp_path / "mine.yaml")]) == 2
        assert sentence in capsys.readouterr().err


def test_the_help_states_every_law(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "masks_move_and_rest: No mask moves in a round in which `changes_masks` says False" in out


def test_a_schedule_is_moved_into_the_short_run_and_nothing_else():
    long = Magnitude(sparsity=0.8, schedule="cubic", start=10, finish=40, every=4)
    assert shorten(long) == Magnitude(sparsity=0.8, schedule="cubic", start=2, finish=ROUNDS - 1, every=2)
    assert shorten(Magnitude(sparsity=0.8)) == Magnitude(sparsity=0.8)
    assert shorten(FedDST(sparsity=0.8)) == FedDST(sparsity=0.8, every=2, until=ROUNDS - 1)
    assert shorten(FedDST(sparsity=0.8, until=0)) == FedDST(sparsity=0.8, every=2, until=0)

    @dataclass(frozen=True, kw_only=True)
    class Late(Policy):
        at_round: int = 30
        initial_every: int = 50
        surround: int = 30

    assert shorten(Late()) == Late(at_round=2, initial_every=2)


def test_what_is_set_by_hand_stands_after_the_schedule_was_moved():
    assert load("feddst", ["every=4"]) == FedDST(sparsity=0.8, every=4, until=ROUNDS - 1)
    assert load("feddst", ["every=4"], short=False) == FedDST(sparsity=0.8, every=4)


def test_other_values_follow_the_type_of_a_field():
    base = FedDST(sparsity=0.8)
    assert set(alternatives(base, "allocation")) == {"er", "uniform"}
    assert list(alternatives(base, "regrow_dropped")) == [False]
    assert None in alternatives(base, "gradient_batch_size")
    assert base.gradient_batch_size not in list(alternatives(base, "gradient_batch_size"))
    assert all(isinstance(value, float) for value in alternatives(base, "sparsity"))


def test_pytest_has_a_test_for_each_check_of_a_yaml_and_shows_the_sentence_and_the_law(written, tmp_path):
    command = [sys.executable, "-m", "pytest", "-p", "fedray.testing.plugin", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [*command, "--fedray-check", written("MissesBudget"), "-k", "budget_met or runs or shrunk", "--color=no"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 skipped" in done.stdout
    assert "round 0: 390 of 488 are removed, and sparsity_after promises 0.9" in done.stdout
    assert "The law: After each round the server keeps what `sparsity_after` promises" in done.stdout
    assert "Traceback" not in done.stdout
    refused = subprocess.run(
        [*command, "--fedray-check", "nosuch"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 4
    assert "pruner 'nosuch' does not exist" in refused.stderr
