"""`fedray check` and the plug-in for pytest: what they print, and how they end."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedray.cli import _compose, main
from fedray.errors import ConfigError
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


CUTS = """
from dataclasses import dataclass

from fedray.prune.allocate import uniform
from fedray.prune.select import random_mask
from fedray.round import Policy, refuse


@dataclass(frozen=True, kw_only=True)
class Cuts(Policy):
    cuts = "weights"

    sparsity: float
    start_round: int = 10
    end_round: int = 40

    def __post_init__(self):
        refuse(self.start_round >= self.end_round, "end_round", self.end_round, "it comes after start_round")

    def sparsity_after(self, round):
        return None if round else self.sparsity

    def init_server(self, server, ctx):
        counts = uniform(server.params.layout, ctx.prunable, self.sparsity)
        return server.cut(random_mask(server.params.layout, ctx.prunable, counts, ctx.key)), None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A maker of folders with code and yaml files of a user; what they bring is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def make(name="mine", **files):
        for path, text in files.items():
            place = tmp_path / name / path.replace("__", "/").replace("_yaml", ".yaml").replace("_py", ".py")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        return tmp_path / name

    yield make
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


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
        (
            "_target_: nowhere.Pruner\n",
            "it cannot be imported (No module named 'nowhere'). Code beside the yaml, or in ",
        ),
        ("_target_: fedray.pruners.Magnitud\n", "fedray.pruners has no Magnitud: did you mean Magnitude?"),
        ("_target_: fedray.pruners.Xyz\n", "fedray.pruners has no Xyz: name a class or a function of it"),
        ("a: [\n", "cannot be read"),
        ("- a\n", "holds no settings"),
        ("defaults: [magnitude, _self_]\n", "has a list of defaults, which are known only where it lies in a folder "),
        ("_target_: fedray.pruners.Magnitude\nstart: ${cohort}\n", "values of a run are known only where it lies in "),
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

    @dataclass(frozen=True, kw_only=True)
    class Between(Policy):
        start_round: int = 10
        end_round: int = 40

    assert shorten(Between()) == Between(start_round=2, end_round=ROUNDS - 1)
    assert shorten(Between(), keeping=["start_round"]) == Between(end_round=ROUNDS - 1)


def test_a_schedule_that_is_refused_in_the_short_run_says_that_it_is_there(folder, capsys):
    mine = str(folder(cuts_py=CUTS, pruner__a_yaml="_target_: cuts.Cuts\nsparsity: 0.5\n") / "pruner" / "a.yaml")
    assert main(["check", mine, "--only", "runs"]) == 0
    assert "start_round=2, end_round=5" in capsys.readouterr().out
    assert main(["check", mine, "--only", "runs", "start_round=9"]) == 2
    assert (
        "in the short run, with end_round=5: pruner.end_round is 5; it comes after start_round; choose others, or "
        "leave the schedule as it is by --as-written" in capsys.readouterr().err
    )
    assert main(["check", mine, "--only", "runs", "start_round=9", "end_round=12"]) == 0
    assert "start_round=9, end_round=12" in capsys.readouterr().out
    assert main(["check", mine, "start_round=50", "--only", "runs"]) == 2
    # What is wrong in any run is said without it.
    assert capsys.readouterr().err == "fedray: pruner.end_round is 40; it comes after start_round\n"


def test_a_class_that_raises_what_it_likes_is_refused_all_the_same():
    @dataclass(frozen=True, kw_only=True)
    class Raises(Policy):
        start: int = 10

        def __post_init__(self):
            if self.start < 5:
                raise IndexError("too early")

    with pytest.raises(ConfigError, match="in the short run, with start=2: IndexError: too early"):
        shorten(Raises())


def test_what_is_left_open_in_a_yaml_is_asked_for_and_may_be_given(folder, capsys):
    for place in ("pruner__open_yaml", "open_yaml"):
        made = folder(**{"cuts_py": CUTS, place: "_target_: cuts.Cuts\nsparsity: ???\n"})
        path = made / place.replace("__", "/").replace("_yaml", ".yaml")
        assert main(["check", str(path), "--only", "runs"]) == 2
        assert capsys.readouterr().err == (
            f"fedray: pruner.sparsity is not set; write a value for ??? into {path}, or sparsity=...\n"
        )
        assert main(["check", str(path), "sparsity=0.5", "--only", "runs"]) == 0
        assert "Cuts(sparsity=0.5" in capsys.readouterr().out


def test_a_yaml_in_a_folder_called_pruner_is_composed_as_a_run_composes_it(folder, capsys):
    texts = {
        "pruner__gentle_yaml": "defaults: [magnitude, _self_]\nsparsity: 0.3\n",
        "pruner__gentler_yaml": "defaults: [gentle, _self_]\nsparsity: 0.2\nstart: ${cohort}\n",
        "pruner__magnitude_yaml": "_target_: fedray.pruners.Magnitude\nsparsity: 0.4\n",
    }
    within = folder("a b, c=d'e", **texts)
    assert load(str(within / "pruner" / "gentle.yaml")) == Magnitude(sparsity=0.3)
    cfg, _ = _compose(["pruner=gentler"], within)
    assert (cfg.pruner.sparsity, cfg.pruner.start) == (0.2, cfg.cohort)
    assert load(str(within / "pruner" / "gentler.yaml"), short=False) == Magnitude(sparsity=0.2, start=cfg.cohort)
    assert load(str(within / "pruner" / "gentler.yaml"), ["sparsity=0.7"]) == Magnitude(sparsity=0.7, start=2)
    # A run would take fedray's.
    assert main(["check", str(within / "pruner" / "magnitude.yaml")]) == 2
    assert "has the name of a file of fedray's, and --config-dir takes that one" in capsys.readouterr().err


def test_the_code_of_one_target_is_never_taken_for_that_of_another(folder, capsys):
    yaml = "_target_: cuts.Cuts\nsparsity: 0.5\n"
    one, two = (folder(name, cuts_py=CUTS, pruner__my_yaml=yaml, pruner__own_yaml=yaml) for name in ("one", "two"))
    assert main(["check", str(one / "pruner" / "my.yaml"), str(one / "pruner" / "own.yaml"), "--only", "runs"]) == 0
    capsys.readouterr()
    targets = [str(made / "pruner" / "my.yaml") for made in (one, two)]
    assert main(["check", *targets, "--only", "runs"]) == 2
    seen = capsys.readouterr()
    assert seen.err == (
        f"fedray: {targets[1]} would be checked with module 'cuts' of {one}, which another target brought; check them "
        "one at a time, or rename one of the modules\n"
    )
    assert "passed" not in seen.out


def test_what_the_code_of_a_target_imports_is_its_own_too(folder, capsys):
    helped = "from help_cutting import NAME\n" + CUTS
    files = {"help_cutting_py": "NAME = 1\n", "pruner__my_yaml": "_target_: {}.Cuts\nsparsity: 0.5\n"}
    for name in ("one", "two"):
        texts = {path: text.format(f"of_{name}") for path, text in files.items()}
        folder(name, **texts, **{f"of_{name}_py": helped})
    targets = [str(folder(name) / "pruner" / "my.yaml") for name in ("one", "two")]
    assert main(["check", *targets, "--only", "runs"]) == 2
    assert "would be checked with module 'help_cutting' of" in capsys.readouterr().err


def test_what_is_set_by_hand_stands_after_the_schedule_was_moved():
    assert load("feddst", ["every=4"]) == FedDST(sparsity=0.8, every=4, until=ROUNDS - 1)
    assert load("feddst", ["every=4"], short=False) == FedDST(sparsity=0.8, every=4, until=50)


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
    assert "The law: After each round the server keeps in all what `sparsity_after` promises" in done.stdout
    assert "Traceback" not in done.stdout
    refused = subprocess.run(
        [*command, "--fedray-check", "nosuch"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 4
    assert "pruner 'nosuch' does not exist" in refused.stderr
