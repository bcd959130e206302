"""Every mistake ends with one sentence on stderr, `fedray: ...`, and exit code 2; a run that breaks ends with 1."""

import logging
import os
import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from fedray.cli import main

TINY = [
    "runtime=inline",
    "num_clients=4",
    "cohort=2",
    "rounds=2",
    "model.hidden=[8]",
    "trainer.engine=eager",
    "tracker.progress=none",
    "tracker.wandb.mode=disabled",
]


@pytest.fixture
def fedray(monkeypatch, tmp_path, capfd, caplog):
    """Run the command line in an empty folder; returns exit code and the only line on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedray"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # put back after the test
    monkeypatch.delenv("FEDRAY_TRACEBACK", raising=False)

    def call(*arguments):
        before = set(sys.modules)
        code = main([*TINY, *arguments])
        for name in set(sys.modules) - before:
            if name.startswith("law_user"):
                del sys.modules[name]
        # In a terminal a warning that nobody handles is a line on stderr.
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        said = capfd.readouterr().err
        assert "Traceback" not in said
        lines = said.splitlines()
        assert len(lines) == (1 if code else 0), said
        if code:
            assert lines[0].startswith("fedray: ")
            assert len(lines[0]) < 500
        return code, said.rstrip("\n")

    return call


# Any other model in place of the MLP; TINY's setting of its widths is left out.
LINEAR = ("model=lenet", "~model.hidden", "model._target_=torch.nn.Linear", "+model.out_features=10")

GATED = ("pruner=lotteryfl", "validation=0.2", "num_clients=60")

MISTAKES = {
    # what is written: what the sentence must say
    ("batch_norm=local",): ["batch_norm is 'local'", "no batch normalisation", "model=batchnorm_cnn"],
    ("batch_norm=group",): ["batch_norm is 'group'", "no batch normalisation", "batch_norm=average"],
    ("batch_norm=statik",): ["batch_norm is 'statik'", "static"],
    ("validation=1.0",): ["validation is 1.0", "from 0 to below 1"],
    ("trainer.lr_decay=0.5",): ["trainer.lr_decay is 0.5", "trainer.lr_schedule=step"],
    ("server.lr_decay=0.5",): ["server.lr_decay is 0.5", "server.lr_schedule=step"],
    ("server.lr_schedule=cosin",): ["server.lr_schedule is 'cosin'", "cosine"],
    ("trainer.eps=1.0",): ["trainer.eps is 1.0", "trainer.optimizer=adam"],
    ("stop.metric=foo",): ["stop.metric is 'foo'", "test/accuracy"],
    ("stop.metric=test/mse", "stop.patience=2"): ["stop.metric is 'test/mse'", "test/loss"],
    ("stop.min_delta=0.1",): ["stop.min_delta is 0.1", "stop.patience"],
    ("stop.at_targets=true",): ["stop.at_targets is True", "stop.targets=[0.95]"],
    ("stop.patience=2", "eval.every=0"): ["eval.every is 0", "1 or more"],
    ("sampling=fixed", "sampling.clients=[0,9]"): ["sampling.clients is [0, 9]", "from 0 to 3"],
    ("sampling=fixed", "sampling.clients=[0]"): ["names 1 clients", "cohort=1"],
    ("sampling._target_=fedray.sim.sampling.Always",): ["sampling._target_", "such as fedray.sim.sampling.Uniform"],
    ("availability._target_=fedray.sim.sampling.Uniform",): ["availability._target_", "one boolean a client"],
    ("availability=dropout", "availability.rate=1.0"): ["availability.rate is 1.0", "in [0, 1)"],
    ("+augment.x={_target_: torch.nn.ReLU}",): ["augment"],
    ("strategy=fedsgd", "correction=fedprox"): ["correction.fedprox.mu", "strategy=fedavg"],
    ("personal=fedper", "personal.fedper.layers=9"): ["personal.fedper.layers is 9"],
    ("personal=fedper", "personal.fedper.names=[nothing*]"): ["personal.fedper.names", "no parameter"],
    ("personal=fedbn", "batch_norm=affine", "model=batchnorm_cnn", "~model.hidden"): ["personal.fedbn", "average"],
    ("partition=natural",): ["partition._target_", "by their owner", "digits"],
    ("partition=extended_dirichlet", "partition.cut.beta=-1"): ["partition.cut.beta is -1"],
    ("partition=mixed", "partition.labels.alpha=0"): ["partition.labels.alpha is 0"],
    ("data=text", "data.path=FOLDER"): ["data.path is 'FOLDER'"],
    ("data=regression", "correction=fedlc"): ["fedlc", "regression"],
    ("+model.init_from.source=NOWHERE",): ["model.init_from.source is 'NOWHERE'"],
    ("+model.init_from=RUN",): ["model.init_from is 'RUN'", "source"],
    ("model.hidden=[1.5]",): ["model.hidden is [1.5]", "a list of integers"],
    ("name=..",): ["name is '..'", "names a folder"],
    ("pruner=random", "pruner.sparsty=0.9"): ["pruner.sparsty", "did you mean pruner.sparsity?"],
    ("pruner=random", "+pruner.sparsty=0.9"): ["pruner.sparsty", "did you mean pruner.sparsity?"],
    ("pruner=random", "pruner.sparsity=1.5"): ["pruner.sparsity is 1.5", "below 1"],
    ("pruner=random", "pruner.sparsity=-0.5"): ["pruner.sparsity is -0.5", "below 1"],
    ("pruner=random", "pruner.sparsity=abc"): ["pruner.sparsity is 'abc'", "a number"],
    ("pruner=random", "pruner.sparsity=nan"): ["pruner.sparsity is nan"],
    ("pruner=random", "pruner.sparsity=null"): ["pruner.sparsity is None", "a number"],
    ("pruner=random", "pruner.allocation=even"): ["pruner.allocation is 'even'", "erk"],
    ("pruner=random", "~pruner.sparsity"): ["pruner.sparsity is not set"],
    ("pruner=magnitude", "pruner.start=1.5"): ["pruner.start is 1.5", "an integer"],
    ("pruner=magnitude", "pruner.start=9"): ["pruner.start is 9", "rounds (2)"],
    ("pruner=magnitude", "pruner.schedule=cubic"): ["pruner.finish is 0"],
    ("pruner=feddst", "strategy=fedsgd"): ["feddst", "strategy=fedavg"],
    ("pruner=structured", "pruner.units=[head]", "pruner.start=2"): ["pruner.units is ['head']", "it has neuron"],
    ("pruner=hybrid", "pruner.unit_score=norm_scale", "pruner.start=2"): ["score of units is norm_scale", "layers.1"],
    ("pruner=structured", "scope.first_layer=false"): ["no units are left", "scope.first_layer", "pruner=magnitude"],
    ("pruner=fjord", "correction=fedsam"): ["correction.fedsam", "fjord"],
    ("pruner=fedrolex", "personal=ditto"): ["from round to round", "pruner.shift=0"],
    ("pruner=lotteryfl", "validation=0.2", "pruner.sparsity=0.999", "pruner.budget=all_parameters"): ["lower it or"],
    (*GATED, "partition=dirichlet", "partition.alpha=0.05"): ["has one training example", "partition.min_size=2"],
    ("strategy=fedsgd", "trainer.epochs=2"): ["trainer.epochs is 2", "trainer.epochs=1"],
    ("strategy=fedsgd", "trainer.momentum=0.9"): ["trainer.momentum is 0.9"],
    ("correction=fedprox", "correction.fedprox.mu=-1"): ["correction.fedprox.mu is -1"],
    ("rounds=ten",): ["rounds is 'ten'", "an integer"],
    ("rounds=0",): ["rounds is 0", "at least 1"],
    ("rounds=2.5",): ["rounds is '2.5'", "an integer"],
    ("round=3",): ["round is not a setting", "did you mean rounds?"],
    ("+round=3",): ["round is not a setting", "did you mean rounds?"],
    ("seed=x",): ["seed is 'x'", "an integer"],
    ("cohort=5",): ["cohort is 5", "num_clients", "4"],
    ("cohort=0",): ["cohort is 0", "at least 1"],
    ("name=a/b",): ["name is 'a/b'"],
    ("trainer.lr=fast",): ["trainer.lr is 'fast'", "a number"],
    ("trainer.lr=nan",): ["trainer.lr is nan"],
    ("trainer.lr=0",): ["trainer.lr is 0", "above 0"],
    ("trainer.lr=inf",): ["trainer.lr is inf"],
    ("trainer.learning_rate=0.1",): ["trainer.learning_rate is not a setting"],
    ("trainer.batch_size=0",): ["trainer.batch_size is 0", "at least 1"],
    ("trainer.steps=3",): ["trainer.steps is 3", "trainer.epochs"],
    ("trainer.epochs=null",): ["exactly one", "trainer.epochs"],
    ("trainer.optimizer=sdg",): ["trainer.optimizer is 'sdg'", "sgd"],
    ("trainer.nesterov=true",): ["trainer.nesterov is True", "trainer.momentum"],
    ("trainer.betas=[0.9]",): ["trainer.betas"],
    ("trainer.momentum=1.0",): ["trainer.momentum is 1.0", "below 1"],
    ("trainer=nope",): ["trainer=nope does not exist", "adam"],
    ("+experiment=nope",): ["experiment=nope does not exist", "quickstart"],
    ("experiment=nope",): ["experiment"],
    ("pruner=nope",): ["pruner=nope does not exist", "magnitude"],
    ("data=nope",): ["data=nope does not exist", "mnist"],
    ("prunner=random",): ["prunner is not a", "did you mean pruner?"],
    ("+prunner=random",): ["prunner is not a", "did you mean pruner?"],
    ("+nogroup=nothing",): ["nogroup"],
    ("data.path=/nowhere",): ["/nowhere", "data.path"],
    ("data=mnist", "data.path=/nowhere"): ["/nowhere", "data.path"],
    ("data=mnist",): ["data.path"],
    ("partition.alpha=0",): ["partition.alpha is 0"],
    ("partition.alpha=nan",): ["partition.alpha is nan"],
    ("partition.min_size=100000",): ["partition.min_size is 100000"],
    ("num_clients=5000",): ["5000"],
    ("eval.clients=some",): ["eval.clients is 'some'", "cohort"],
    ("eval.every=-1",): ["eval.every is -1"],
    ("runtime.slots=0",): ["runtime.slots is 0"],
    ("runtime.device=tpu",): ["runtime.device is 'tpu'", "cuda"],
    ("runtime=slurm",): ["runtime=slurm does not exist", "inline"],
    ("tracker.progress=loud",): ["tracker.progress is 'loud'", "plain"],
    ("tracker.wandb.mode=on",): ["tracker.wandb.mode"],
    ("pruner._target_=fedray.pruners.Nothing",): ["pruner._target_ is 'fedray.pruners.Nothing'", "has no Nothing"],
    ("pruner._target_=nowhere.Nothing",): ["pruner._target_ is 'nowhere.Nothing'", "No module named 'nowhere'"],
    ("pruner._target_=fedray.models.MLP",): ["pruner"],
    ("pruner._target_=builtins.dict",): ["pruner._target_ is 'builtins.dict'", "fedray.round.Policy"],
    ("data._target_=builtins.dict",): ["data._target_ is 'builtins.dict'", "fedray.data.Dataset"],
    ("model._target_=nowhere.Net",): ["model._target_ is 'nowhere.Net'", "cannot be imported"],
    ("model=lenet", "~model.hidden"): ["model=lenet", "16x16"],
    (*LINEAR, "+model.in_features=3"): ["model._target_ is 'torch.nn.Linear'", "samples of shape (1, 8, 8)"],
    (*LINEAR, "+model.in_features=8"): ["model._target_ is 'torch.nn.Linear'", "(2, 1, 8, 10)", "(2, 10) logits"],
    ("+model.num_classes=3",): ["model._target_", "(2, 3)", "(2, 10) logits"],
    ("model.width=3",): ["model.width is not a setting"],
    ("model.hidden=[0]",): ["model.hidden is [0]"],
    ("model.hidden=wide",): ["model.hidden is 'wide'"],
    ("wire.up.chain.float32._target_=fedray.wire.Float64",): [
        "wire.up.chain.float32._target_",
        "has no Float64: did you mean Float",
    ],
    ("rounds",): ["'rounds' cannot be read", "key=value"],
    ("rounds=",): ["rounds is ''", "an integer"],
    ("rounds=[1,",): ["'rounds=[1,' cannot be read"],
    ("seed=${nothing}",): ["nothing"],
}


def tiny_without(mistake):
    """Overrides that `~key` removes are not set before."""
    return [a for a in mistake if not a.startswith("~model.hidden")]


@pytest.mark.parametrize("mistake", MISTAKES, ids=" ".join)
def test_a_mistake_ends_with_one_sentence_that_names_key_value_and_remedy(mistake, fedray, monkeypatch):
    if "~model.hidden" in mistake:
        monkeypatch.setattr(sys.modules[__name__], "TINY", [a for a in TINY if not a.startswith("model.hidden")])
    code, said = fedray(*tiny_without(mistake))
    assert code == 2, said
    for part in MISTAKES[mistake]:
        assert part in said
    assert not list(Path().glob("outputs/*/*/*.jsonl"))


def test_a_configuration_without_mistakes_ends_with_zero(fedray):
    assert fedray() == (0, "")
    assert len(list(Path().glob("outputs/run/*/rounds.jsonl"))) == 1


def test_a_mistake_leaves_no_folder_that_looks_like_a_run(fedray):
    fedray("cohort=5")
    assert not [path for path in Path().rglob("*") if path.is_file()]


# -- the user's own components ---------------------------------------------------------------------------------------


def write(name, text):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))


def test_a_data_source_that_yields_nan_is_refused_by_array_and_sample(fedray):
    write("mine/data/poisoned.yaml", "_target_: law_user_data.poisoned\npath: null\n")
    write(
        "mine/law_user_data.py",
        """
        import numpy as np
        from fedray.data import Dataset

        def poisoned(path):
            x = np.random.default_rng(0).normal(size=(60, 5))
            x[17, 2] = float("nan")
            y = np.arange(60) % 3
            return Dataset.of(name="poisoned", train_x=x, train_y=y, test_x=x[:9], test_y=y[:9])
        """,
    )
    code, said = fedray("--config-dir", "mine", "data=poisoned")
    assert code == 2
    assert "data.train_x" in said
    assert "NaN" in said
    assert "sample 17" in said


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise OSError('the disk is full')", ["data", "the disk is full"]),
        ("return 7", ["data", "Dataset"]),
        ("import nothing_like_it", ["nothing_like_it"]),
    ],
    ids=["raises", "returns nonsense", "imports what is not there"],
)
def test_a_data_source_that_fails_is_refused_in_a_sentence(body, says, fedray):
    write("mine/data/broken.yaml", "_target_: law_user_broken.source\n")
    write("mine/law_user_broken.py", f"def source():\n    {body}\n")
    code, said = fedray("--config-dir", "mine", "data=broken")
    assert code == 2
    for part in says:
        assert part in said


def test_a_config_folder_that_is_not_there_is_refused(fedray):
    code, said = fedray("--config-dir", "not_here", "seed=1")
    assert code == 2
    assert "not_here" in said


@pytest.mark.parametrize(
    ("hook", "where"), [("end", "client"), ("begin", "client"), ("send", "client"), ("settle", "round 2")]
)
def test_a_policy_that_raises_ends_the_run_naming_round_client_and_hook(hook, where, fedray):
    write("mine/pruner/breaking.yaml", "_target_: law_user_policy.Breaking\n")
    write(
        "mine/law_user_policy.py",
        f"""
        from dataclasses import dataclass
        from fedray.round import Policy

        @dataclass(frozen=True, kw_only=True)
        class Breaking(Policy):
            def {hook}(self, *arguments):
                if arguments[-1].round == 2:
                    raise KeyError("missing thing")
                return super().{hook}(*arguments)
        """,
    )
    code, said = fedray("--config-dir", "mine", "pruner=breaking")
    assert code == 1
    assert "round 2" in said
    assert where in said
    assert f"pruner.{hook}" in said
    assert "missing thing" in said
    if where == "client":
        assert re.search(r"client \d", said)
    rounds = next(Path().glob("outputs/run/*/rounds.jsonl")).read_text().splitlines()
    assert len(rounds) <= 1  # a round is finished when its row is written


@pytest.mark.parametrize(
    ("strategy", "wire"),
    [
        ("fedavg", "float32"),
        ("fedsgd", "float32"),
        ("fedavg", "float16"),
        ("fedsgd", "float16"),  # the server's model does not fit on its way down
    ],
)
def test_weights_that_explode_end_the_run_naming_client_part_and_tensor(strategy, wire, fedray):
    code, said = fedray("trainer.lr=1e20", f"strategy={strategy}", f"wire={wire}", "rounds=4")
    assert code == 1, said
    assert re.search(r"client \d", said)
    assert re.search(r"round \d", said)
    assert re.search(r"part '\w+'", said)
    assert re.search(r"tensor '[\w.]+'", said)
    assert "trainer.lr" in said


def test_a_single_client_that_explodes_is_named_too(fedray):
    code, said = fedray("trainer.lr=1e20", "cohort=1")
    assert code == 1
    assert re.search(r"client \d in round \d: part 'delta', tensor 'layers", said)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["nowhere"], ["nowhere"]), ([], ["run"]), (["x", "--format", "onnx"], ["--format", "onnx"])],
)
def test_mistakes_of_other_commands_are_sentences_too(arguments, says, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    said = capfd.readouterr().err
    assert said.startswith("fedray: ")
    assert len(said.splitlines()) == 1
    for part in says:
        assert part in said


def test_the_environment_is_left_as_it_was(fedray):
    from hydra.core.global_hydra import GlobalHydra

    fedray("cohort=5")
    fedray()
    assert not GlobalHydra.instance().is_initialized()
    assert "outputs" not in os.getcwd()


def test_a_refusal_leaves_nothing_behind_and_takes_no_folder_of_the_users(fedray, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for where in ([], ["hydra.run.dir=run"], [f"hydra.run.dir={mine}/run"]):
        before = sorted(Path.cwd().iterdir())
        assert fedray("wire.up.decay=0.5", *where)[0] == 2
        assert sorted(Path.cwd().iterdir()) == before
        assert mine.is_dir()
