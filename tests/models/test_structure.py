"""Each model tells its prunable tensors and its head, and foreign modules are read the same way."""

from functools import partial

import pytest
import torch
from torch import nn

from fedray.errors import ConfigError
from fedray.models import (
    GPT,
    MLP,
    VGG11,
    CharLSTM,
    LeNet,
    Linear,
    Logits,
    LSTMClassifier,
    ResNet,
    Scope,
    TransformerClassifier,
    head_names,
)
from fedray.models.task import kinds, prunable_names

TOKENS = {"shape": (6,), "vocabulary": 9}
IMAGES = {"shape": (3, 32, 32), "num_classes": 10}
LSTM = ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1")
BLOCK = ("attention", "projection", "expansion", "contraction")
BLOCKS = tuple(f"blocks.{block}.{layer}.weight" for block in range(2) for layer in BLOCK)
RESNET8 = (
    "conv", *(f"blocks.{block}.{layer}" for block, layers in enumerate(("12", "12s", "12s"))
              for layer in ("shortcut.0" if kind == "s" else f"conv{kind}" for kind in layers)), "fc",
)  # fmt: skip


@pytest.mark.parametrize(
    ("build", "prunable", "head"),
    [
        (partial(Linear, **IMAGES), ("fc.weight",), ("fc.weight", "fc.bias")),
        (partial(Linear, bias=False, **IMAGES), ("fc.weight",), ("fc.weight",)),
        (
            partial(MLP, **IMAGES, hidden=(4,)),
            ("layers.1.weight", "layers.3.weight"),
            ("layers.3.weight", "layers.3.bias"),
        ),
        (
            partial(LeNet, **IMAGES),
            ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight", "fc3.weight"),
            ("fc3.weight", "fc3.bias"),
        ),
        (
            partial(VGG11, norm="batch", **IMAGES),
            (
                *(f"features.{at}.weight" for at in (0, 4, 8, 11, 15, 18, 22, 25)),
                *(f"classifier.{at}.weight" for at in (1, 4, 6)),
            ),
            ("classifier.6.weight", "classifier.6.bias"),
        ),
        (
            partial(ResNet, blocks=(1, 1, 1), **IMAGES),
            tuple(f"{name}.weight" for name in RESNET8),
            ("fc.weight", "fc.bias"),
        ),
        (partial(CharLSTM, **TOKENS), (*(f"lstm.{name}" for name in LSTM), "fc.weight"), ("fc.weight", "fc.bias")),
        (
            partial(LSTMClassifier, num_classes=3, **TOKENS),
            (*(f"lstm.{name}" for name in LSTM[:2]), "fc.weight"),
            ("fc.weight", "fc.bias"),
        ),
        (partial(GPT, layers=2, **TOKENS), BLOCKS, ("token.weight",)),
        (partial(GPT, layers=2, tied=False, **TOKENS), (*BLOCKS, "head.weight"), ("head.weight",)),
        (
            partial(TransformerClassifier, num_classes=3, **TOKENS),
            (*BLOCKS, "fc.weight"),
            ("fc.weight", "fc.bias"),
        ),
    ],
)
def test_a_model_tells_its_prunable_tensors_and_its_head(build, prunable, head):
    module = build()
    assert prunable_names(module, Scope()) == prunable
    assert head_names(module) == head


def test_every_parameter_of_pytorchs_layers_has_its_kind():
    module = nn.ModuleDict(
        {
            "gru": nn.GRU(3, 4),
            "cell": nn.LSTMCell(3, 4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "apart": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            "bilinear": nn.Bilinear(2, 3, 4),
            "transposed": nn.ConvTranspose2d(2, 3, 3),
            "norm": nn.RMSNorm(4),
            "bag": nn.EmbeddingBag(4, 3),
            "activation": nn.PReLU(),
        }
    )
    found = kinds(module)
    weights = {name for name, kind in found.items() if kind == "weight"}
    assert weights == {
        "gru.weight_ih_l0", "gru.weight_hh_l0", "cell.weight_ih", "cell.weight_hh",
        "attention.in_proj_weight", "attention.out_proj.weight",
        "apart.q_proj_weight", "apart.k_proj_weight", "apart.v_proj_weight", "apart.out_proj.weight",
        "bilinear.weight", "transposed.weight",
    }  # fmt: skip
    assert {name for name, kind in found.items() if kind == "norm"} == {"norm.weight"}
    assert {name for name, kind in found.items() if kind == "other"} == {"bag.weight", "activation.weight"}
    assert {name for name, kind in found.items() if "bias" in name} == {
        name for name, kind in found.items() if kind == "bias"
    }


class _Conv1D(nn.Module):
    """A linear layer that is no nn.Linear, as GPT-2 in transformers has them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))


class _RootMeanNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def test_layers_of_other_packages_are_told_by_name_and_shape():
    module = nn.Sequential(_Conv1D(), _RootMeanNorm())
    assert kinds(module) == {"0.weight": "weight", "1.weight": "norm"}
    assert head_names(module) == ()


class _Output:
    def __init__(self, logits):
        self.logits = logits


class _Answering(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.fc, self.wrap = nn.Linear(3, 2), wrap

    def forward(self, x):
        return self.wrap(self.fc(x))


def test_logits_are_taken_out_of_what_a_module_returns():
    x = torch.randn(4, 3)
    plain = _Answering(lambda y: y)
    for wrap in (_Output, lambda y: y):
        module = Logits(_Answering(wrap))
        module.module.load_state_dict(plain.state_dict())
        assert torch.equal(module(x), plain(x))
    assert head_names(module) == ("module.fc.weight", "module.fc.bias")
    with pytest.raises(ConfigError, match="returns a dict without logits"):
        Logits(_Answering(lambda y: {"y": y}))(x)
