"""Later tokens change nothing earlier, padding changes nothing, and PyTorch's own layers agree with ours."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from fedray.keys import Key
from fedray.models import GPT, CharLSTM, LSTMClassifier, Task, TransformerClassifier
from fedray.models.task import OBJECTIVES, kinds, trainable
from fedray.train import Engine, Samples
from fedray.tree import Mask

LENGTH, VOCABULARY = 6, 11
TOKENS = {"shape": (LENGTH,), "vocabulary": VOCABULARY}
NEXT = {
    "gpt": partial(GPT, width=8, layers=2, heads=2, **TOKENS),
    "gpt untied": partial(GPT, width=8, layers=2, heads=2, tied=False, **TOKENS),
    "char_lstm": partial(CharLSTM, embedding=3, hidden=5, **TOKENS),
}
CLASSIFIERS = {
    "lstm": partial(LSTMClassifier, num_classes=3, embedding=4, hidden=5, layers=2, **TOKENS),
    "transformer": partial(TransformerClassifier, num_classes=3, width=8, heads=2, **TOKENS),
}


def drawn(build, seed=0):
    """A module with weights far enough from zero that everything shows."""
    module = Task(build=build).module(Key.of(seed)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=Key.of(seed).fold("more").torch()))
    return module


def some_tokens(count=4):
    return torch.randint(1, VOCABULARY, (count, LENGTH), generator=Key.of(3).torch())


@pytest.mark.parametrize("name", NEXT)
def test_a_later_token_never_changes_earlier_logits(name):
    module, tokens = drawn(NEXT[name]), some_tokens()
    before = module(tokens)
    for place in range(LENGTH):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        after = module(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place:], before[:, place:], atol=1e-4)


def test_a_block_of_gpt_is_pytorchs_transformer_layer():
    width, heads = 8, 2
    module, tokens = drawn(NEXT["gpt untied"]), some_tokens()
    x = module.token(tokens) + module.position
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    for block in module.blocks:
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, partial(nn.functional.gelu, approximate="tanh"), batch_first=True,
            norm_first=True,
        )  # fmt: skip
        pairs = [
            (layer.self_attn.in_proj_weight, block.attention.weight),
            (layer.self_attn.in_proj_bias, block.attention.bias),
        ]
        for theirs, ours in (
            (layer.self_attn.out_proj, block.projection), (layer.linear1, block.expansion),
            (layer.linear2, block.contraction), (layer.norm1, block.norm1), (layer.norm2, block.norm2),
        ):  # fmt: skip
            pairs += [(theirs.weight, ours.weight), (theirs.bias, ours.bias)]
        with torch.no_grad():
            for theirs, ours in pairs:
                theirs.copy_(ours)
        x = layer(x, src_mask=mask, is_causal=True)
    expected = nn.functional.layer_norm(x, (width,), module.norm.weight, module.norm.bias) @ module.head.weight.T
    torch.testing.assert_close(module(tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_char_lstm_is_its_gates_by_hand():
    module, tokens = drawn(NEXT["char_lstm"]), some_tokens(2)
    x = module.embedding.weight[tokens]
    for layer in range(2):
        weight_in, weight_on, bias_in, bias_on = (
            getattr(module.lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden = cell = torch.zeros(2, 5)
        outputs = []
        for step in range(LENGTH):
            gates = x[:, step] @ weight_in.T + bias_in + hidden @ weight_on.T + bias_on
            enter, forget, fresh, leave = gates.chunk(4, 1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * fresh.tanh()
            hidden = leave.sigmoid() * cell.tanh()
            outputs.append(hidden)
        x = torch.stack(outputs, 1)
    torch.testing.assert_close(module(tokens), x @ module.fc.weight.T + module.fc.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_padding_at_the_end_is_not_read_and_a_text_of_padding_has_a_class(name):
    build = CLASSIFIERS[name]
    module, tokens = drawn(build), some_tokens()
    tokens[:, 4:] = 0
    short = drawn(partial(build, shape=(4,)) if name == "lstm" else build)
    expected = module(tokens)
    with torch.no_grad():
        module.state_dict()["embedding.weight" if name == "lstm" else "token.weight"][0] = 7.0
    torch.testing.assert_close(module(tokens), expected)
    if name == "lstm":
        torch.testing.assert_close(short(tokens[:, :4]), expected)
    assert module(torch.zeros(1, LENGTH, dtype=torch.int64)).isfinite().all()
    read = drawn(partial(build, padding=None))
    assert not torch.allclose(read(tokens), expected, atol=1e-4)


def test_dropout_of_gpt_acts_in_training_alone():
    module, tokens = drawn(partial(NEXT["gpt"], dropout=0.5)), some_tokens()
    assert torch.equal(module(tokens), module(tokens))
    module.train()
    assert not torch.equal(module(tokens), module(tokens))


@pytest.mark.parametrize("name", ["gpt", "char_lstm"])
def test_a_language_model_trains_in_views_of_one_buffer_as_torch_optim_does(name):
    """An LSTM keeps a list of its weights: the engine moves them into its buffer without a warning or a copy."""
    from fedray.round import Job, Message, Optim

    task = Task(build=NEXT[name], objective=OBJECTIVES["next_token"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        engine = Engine(task, key=Key.of(0), sample_shape=(LENGTH,), device="cpu", kind="eager", vocabulary=VOCABULARY)
        x = some_tokens(7).to(torch.int32)
        y = (x.long() * 2 + 1) % VOCABULARY
        zero = torch.zeros(1)
        samples = Samples(x=x, y=y, index=torch.arange(7), mean=zero, std=zero + 1, scale=1.0, tokens=True)
        origin = engine.origin()
        job = Job(
            params=origin.params, buffers=origin.buffers, mask=Mask.full(engine.params_layout), num_steps=3,
            batch_size=7, lr=0.5, optim=Optim(momentum=0.9),
        )  # fmt: skip
        fit = engine.fit(job, Message(parts={}, mask=None), samples, Key.of(1))
    reference = task.module(Key.of(0))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(x.long()).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    for key, value in trainable(reference).items():
        torch.testing.assert_close(fit.params[key], value.detach(), rtol=1e-3, atol=1e-5)
        assert not torch.equal(fit.params[key], origin.params[key]), key


def test_a_tied_head_is_one_tensor_and_no_pruner_cuts_it():
    tied, untied = drawn(NEXT["gpt"]), drawn(NEXT["gpt untied"])
    assert set(kinds(untied)) - set(kinds(tied)) == {"head.weight"}
    assert kinds(tied)["token.weight"] == kinds(tied)["position"] == "other"
    assert kinds(untied)["head.weight"] == "weight"
