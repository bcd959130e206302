from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from looking import CLASSES, Looking, one_thread
from torch import nn
from yaml_checks import check_file, facts

from fedray.errors import ConfigError
from fedray.pruners import SynFlow
from fedray.round import FieldError, Server
from fedray.tree import Layout, Mask, Tree, equal


class Chain(nn.Module):
    """Without biases, wide at one end and narrow at the other."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.fc = nn.Linear(16, 20, bias=False)
        self.out = nn.Linear(20, CLASSES, bias=False)

    def forward(self, x):
        return self.out(F.relu(self.fc(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))))


@pytest.fixture(scope="module")
def looking():
    with one_thread():
        yield Looking.at(Chain, (1, 6, 6))


def published(looking, sparsity, iterations):
    """The authors' loop in plain PyTorch: linearise, score on ones, cut globally by count, restore the signs."""
    module = Chain().double().eval()
    params = looking.server.params
    named = dict(module.named_parameters())
    signs = {name: params[name].sign().double() for name in named}
    masks = {name: torch.ones_like(p) for name, p in named.items()}
    total = sum(p.numel() for p in named.values())
    for step in range(1, iterations + 1):
        for name, parameter in named.items():
            parameter.data = params[name].double().abs() * masks[name]
            parameter.grad = None
        module(torch.ones(1, 1, 6, 6, dtype=torch.float64)).sum().backward()
        scores = torch.cat([(p.grad * p.data).flatten() for p in named.values()])
        count = round((1 - sparsity) ** (step / iterations) * total)
        kept = torch.zeros(total, dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[:count]] = True
        masks = dict(zip(named, (k.view(p.shape) for k, p in split(kept, named)), strict=True))
    restored = {name: signs[name] * params[name].double().abs() * masks[name] for name in named}
    return {name: mask.bool() for name, mask in masks.items()}, restored


def split(kept, named):
    return zip(kept.split([p.numel() for p in named.values()]), named.values(), strict=True)


@pytest.mark.parametrize(("sparsity", "iterations"), [(0.5, 1), (0.9, 10), (0.98, 100)])
def test_the_mask_is_that_of_the_published_loop_with_signs_restored(looking, sparsity, iterations):
    server, _ = SynFlow(sparsity=sparsity, iterations=iterations).init_server(looking.server, looking.ctx(0))
    masks, restored = published(looking, sparsity, iterations)
    for name, mask in masks.items():
        assert torch.equal(server.mask[name], mask)
        assert torch.equal(server.params[name].double(), restored[name])
    assert sum(server.mask.counts().values()) == round((1 - sparsity) * 416)  # 36 + 320 + 60


def test_the_flow_through_every_layer_sums_to_the_same_after_the_cut(looking):
    server, _ = SynFlow(sparsity=0.9).init_server(looking.server, looking.ctx(0))
    score = looking.engine.flow(server.params, server.buffers, server.mask)
    sums = [float(values.double().sum()) for _, values in score.items()]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-5)
    assert sums[0] > 0


def test_a_hundred_steps_keep_a_way_through_where_one_cuts_a_layer_off(looking):
    """Of the widest layer each weight carries least, so one ranking takes all of it first."""
    at_once, slowly = (
        SynFlow(sparsity=0.96, iterations=n).init_server(looking.server, looking.ctx(0))[0] for n in (1, 100)
    )
    assert sum(at_once.mask.counts().values()) == sum(slowly.mask.counts().values()) == 17
    flows = [float(looking.engine.flow(s.params, s.buffers, s.mask).flat.sum()) for s in (at_once, slowly)]
    assert min(at_once.mask.counts().values()) == 0
    assert flows[0] == 0.0 < flows[1]
    assert min(slowly.mask.counts().values()) >= 1


def test_scores_are_found_anew_at_every_step_under_the_mask_of_the_last_by_hand(world):
    layout, asked = Layout(("a", "free"), ((8,), (2,))), []

    def flow(params, buffers, mask):
        asked.append(None if mask is None else mask.counts()["a"])
        values = torch.arange(10.0) if mask is None else torch.where(mask.flat, -torch.arange(10.0), 99.0)
        return Tree(layout, values)

    ctx = replace(world.ctx(0), prunable=("a",), flow=flow)
    server = Server(params=Tree(layout, torch.ones(10)), buffers=Tree.zeros(Layout((), ())))
    cut, _ = SynFlow(sparsity=0.75, iterations=2).init_server(server, ctx)
    # Half: the four highest, 4 to 7. A half of them, by other scores: 4 and 5; what is gone stays gone.
    assert asked == [None, 4]
    assert cut.mask.flat.tolist() == [False] * 4 + [True, True, False, False] + [True, True]
    assert cut.params.flat.tolist() == [0.0] * 4 + [1.0, 1.0, 0.0, 0.0] + [1.0, 1.0]


class Normed(nn.Module):
    """A norm of each example subtracts, so that slopes have both signs."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.out(F.relu(self.norm(self.fc(x))))


def test_slopes_below_zero_count_by_their_magnitude_as_in_the_published_code():
    looking = Looking.at(Normed)
    params, module = looking.server.params, Normed().double().eval()
    for name, parameter in module.named_parameters():
        parameter.data = params[name].double().abs()
    module(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    signed = torch.cat([(p.grad * p.data).flatten() for p in module.parameters()])
    assert bool((signed < 0).any())
    score = looking.engine.flow(params, looking.server.buffers, None)
    assert torch.allclose(score.flat.double(), signed.abs() / signed.abs().max(), atol=1e-6)


def test_a_model_through_which_the_flow_is_not_conserved_is_warned_of():
    policy, kinds = SynFlow(sparsity=0.5), {"fc.weight": "weight", "norm.weight": "norm"}
    (sentence,) = policy.warns(facts(policy, kinds=kinds, has_statistics=False))
    assert "GroupNorm or LayerNorm" in sentence
    assert policy.warns(facts(policy, kinds=kinds, has_statistics=True)) == ()
    assert policy.warns(facts(policy, kinds={"fc.weight": "weight"}, has_statistics=False)) == ()
    assert policy.warns(facts(policy)) == ()


def test_biases_stay_and_a_mask_that_the_model_came_with_is_respected():
    looking = Looking.at()
    layout = looking.engine.params_layout
    inherited = Mask.of(layout, {"fc.weight": torch.arange(30).view(5, 6) % 2 == 0})
    server, _ = SynFlow(sparsity=0.7).init_server(looking.server.cut(inherited), looking.ctx(0))
    assert not (server.mask.flat & ~inherited.flat).any()
    assert server.mask.counts()["fc.bias"] == 5
    assert sum(server.mask.counts(("fc.weight", "out.weight")).values()) == 14
    with pytest.raises(ConfigError, match="it must be 0 to 30, what there is"):
        SynFlow(sparsity=0.2).init_server(looking.server.cut(inherited), looking.ctx(0))


def test_with_nothing_removed_nothing_changes_and_the_mask_never_moves(looking):
    policy = SynFlow(sparsity=0.0, iterations=3)
    server, _ = policy.init_server(looking.server, looking.ctx(0))
    assert equal(server.params, looking.server.params)
    assert [SynFlow(sparsity=0.4).sparsity_after(n) for n in (0, 1, 9)] == [0.4] * 3
    assert [policy.changes_masks(n) for n in (0, 1, 9)] == [True, False, False]


def test_a_model_of_tokens_is_refused():
    with pytest.raises(ConfigError) as caught:
        facts(SynFlow(sparsity=0.5), tokens=True)
    assert str(caught.value) == (
        "pruner is synflow; it needs an input of ones, and the model takes tokens: take a pruner that looks at data, "
        "such as pruner=snip"
    )


def test_the_file_is_complete_and_accepted_from_ten_rounds_on():
    check_file("synflow")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("sparsity", 1.0, "it is 0 to below 1; 0.9 keeps 1 in 10"),
        ("iterations", 0, "it is a number of steps, at least 1"),
        ("budget", "all", "choose prunable_weights or all_parameters"),
        ("rounding", "up", "choose nearest or floor"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(field, value, rule):
    with pytest.raises(FieldError) as caught:
        SynFlow(**{"sparsity": 0.5, field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"
