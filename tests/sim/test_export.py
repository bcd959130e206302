"""Laws of the files that leave fedray: plain PyTorch loads them, and a shrunk model computes the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fedray
from fedray.cli import main
from fedray.errors import ConfigError
from fedray.models import LeNet
from fedray.sim.export import shrunk

CELL = [
    "runtime=inline", "model.hidden=[24,16]", "num_clients=4", "cohort=2", "rounds=2", "partition=iid",
    "pruner=magnitude", "pruner.sparsity=0.97", "pruner.ranking=global", "tracker.progress=none",
    "tracker.wandb.mode=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fedray.Run:
    return fedray.run(CELL, folder=tmp_path_factory.mktemp("export") / "run")


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("form", ["state_dict", "safetensors"])
def test_an_exported_file_loads_into_plain_pytorch(
    run: fedray.Run, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "model.bin"
    assert main(["export", str(run.folder), "--format", form, "--output", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    tensors = torch.load(path, weights_only=True) if form == "state_dict" else load_file(path)
    model = mlp(64, 24, 16, 10)
    model.load_state_dict({name.removeprefix("layers."): value for name, value in tensors.items()})
    assert all(torch.equal(tensors[name], value) for name, value in run.state_dict().items())


def test_a_shrunk_export_is_smaller_and_computes_the_same(run: fedray.Run, tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    assert main(["export", str(run.folder), "--format", "state_dict", "--shrink", "--output", str(path)]) == 0
    small = {name.removeprefix("layers."): value for name, value in torch.load(path, weights_only=True).items()}
    whole = {name.removeprefix("layers."): value for name, value in run.state_dict().items()}
    assert sum(v.numel() for v in small.values()) < sum(v.numel() for v in whole.values())
    little, big = mlp(64, small["1.weight"].shape[0], small["3.weight"].shape[0], 10), mlp(64, 24, 16, 10)
    little.load_state_dict(small)
    big.load_state_dict(whole)
    x = torch.randn(50, 1, 8, 8)
    assert torch.allclose(little(x), big(x), atol=1e-5)


def test_convolutions_shrink_through_flattening() -> None:
    torch.manual_seed(0)
    model = LeNet(shape=(1, 28, 28), num_classes=10).eval()
    with torch.no_grad():
        model.conv2.weight[:, 1:3] = 0  # nobody reads two channels of conv1
        model.fc1.weight[:, 5 * 16 : 6 * 16] = 0  # nor the sixteen pixels of one channel of conv2
    small = shrunk(model, (1, 28, 28))
    assert small.conv1.weight.shape[0] == 4
    assert small.conv2.weight.shape == (15, 4, 5, 5)
    assert small.fc1.weight.shape[1] == 15 * 16


def test_a_model_that_is_no_chain_is_refused_and_not_broken() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            return self.c(h + self.b(h).relu())

    torch.manual_seed(0)
    model = Skip().eval()
    with torch.no_grad():
        model.b.weight[:, 0] = 0
    with pytest.raises(ConfigError, match="do not form a plain chain"):
        shrunk(model, (4,))


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert error.startswith("fedray: ")
