"""The published byte counts come out of runs that fedray recorded, not only out of formulas."""

from pathlib import Path

import pytest

import fedray
from fedray.cli import main

MODULE = '''
import numpy as np
from fedray.data import Dataset

def make(shape: list[int], classes: int, each: int) -> Dataset:
    """Images of one value, `each` of every class."""
    labels = np.tile(np.arange(classes), each)
    images = np.zeros((len(labels), *shape), np.uint8)
    test = {"test_x": images[:classes], "test_y": labels[:classes]}
    return Dataset.of(name="made", train_x=images, train_y=labels, num_classes=classes, **test)
'''
QUIET = ["runtime=inline", "eval.every=0", "checkpoint.every=0", "tracker.progress=none", "tracker.wandb.mode=disabled"]
DATA = ["~data", "+data._target_=made_data.make"]
NO_STEPS = ["trainer.epochs=null", "trainer.steps=0"]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "made_data.py").write_text(MODULE)
    return folder


def cells(text: str, name: str) -> list[str]:
    """The cells of the line that begins with this name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_bytes_of_lotteryfl_come_out_of_a_run_of_its_setting(
    code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Methods, test 6: 21,750 weights x 4 bytes x 5 clients x 400 rounds = 165.94 MiB; no biases, uploads only."""
    made = [*DATA, "+data.shape=[1,28,28]", "+data.classes=10", "+data.each=2000"]
    run = fedray.run(["+experiment=wire_lotteryfl", *made, *QUIET, *NO_STEPS], config_dir=code, folder=tmp_path / "run")
    capsys.readouterr()
    assert main(["reprice", str(run.folder), "--as", "lotteryfl,measured"]) == 0
    said = capsys.readouterr().out
    assert cells(said, "lotteryfl")[1:5] == ["165.94 MiB", "0.00 MiB", "165.94 MiB", "174,000,000"]
    # What really crossed: both ways, with biases and headers.
    assert cells(said, "measured")[4] == f"{2 * 400 * 5 * (4 * 21_840 + 48):,}"


PUBLISHED = {"0.5": "138.34", "0.7": "86.26", "0.8": "60.22"}  # FedRTS, table 1; 138.30 is what it prints for the first


@pytest.mark.full
@pytest.mark.parametrize("sparsity", PUBLISHED)
def test_the_bitmap_table_of_fedrts_comes_out_of_a_run_of_that_size(
    sparsity: str, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One client, one round, 32,551,250 parameters, both ways."""
    made = [*DATA, "+data.shape=[1250]", "+data.classes=26041", "+data.each=1", "~model"]
    linear = ["+model._target_=torch.nn.Linear", "+model.in_features=1250", "+model.out_features=26041"]
    one = ["+model.bias=false", "num_clients=1", "cohort=1", "rounds=1", "partition=iid", "pruner=magnitude"]
    run = fedray.run(
        [*made, *linear, *one, f"pruner.sparsity={sparsity}", *QUIET, *NO_STEPS],
        config_dir=code,
        folder=tmp_path / "run",
    )
    capsys.readouterr()
    assert main(["reprice", str(run.folder), "--as", "bitmap"]) == 0
    assert cells(capsys.readouterr().out, "bitmap")[3] == f"{PUBLISHED[sparsity]} MB"
