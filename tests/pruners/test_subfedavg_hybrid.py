from dataclasses import replace

import pytest
import torch
from personal_worlds import Personal
from unit_worlds import chain, normed, placed, residual

from fedray.errors import ConfigError
from fedray.prune.scales import scale_signs
from fedray.prune.unit_scores import alive
from fedray.pruners import SubFedAvgHybrid
from fedray.round import FieldError, Message
from fedray.strategies import FedAvg
from fedray.tree import Tree, equal

MODEL = normed()  # a convolution of 4 filters with batch normalisation, flattened over 2 pixels into 3 outputs
HYBRID = SubFedAvgHybrid(sparsity=0.5, rate=0.25, channel_rate=0.25, distance=0.0, channel_distance=0.0)
UNIFORM = FedAvg(weight_by="uniform")
SCALES = torch.tensor([[3.0, -0.1, 2.0, 0.5], [0.1, 3.0, -2.0, 0.5], [1.0, 2.0, -0.1, 0.2]])
"""By client, where the scales are after training; the biases of the world's other tensors stay where they are drawn."""


@pytest.fixture
def small(world):
    """Scales start at 1 with an order of their own, so that the first step does not have that of the last."""

    class Scaled(type(placed(world, MODEL))):
        @property
        def server(self):
            server = super().server
            flat = server.params.flat.clone()
            flat[self.layout.spans["norm.weight"]] = torch.tensor([1.0, 0.9, 0.8, 0.7])
            return replace(server, params=Tree(self.layout, flat))

        def target(self, client):
            flat = super().target(client).flat.clone()
            flat[self.layout.spans["norm.weight"]] = SCALES[client]
            return Tree(self.layout, flat)

    base = placed(world, MODEL, sizes=(2, 2, 2))
    facts = {name: getattr(base, name) for name in ("layout", "stats", "prunable", "sizes")}
    return Scaled(**facts, num_steps=60, lr=0.1)


def channels(mask):
    return alive(MODEL.structure, ("filter",), mask).flat.tolist()


def test_the_channel_with_the_smallest_scale_goes_with_all_that_belongs_to_it(small):
    run = Personal(small, [HYBRID, UNIFORM])
    turns = run.round()
    # After 60 steps scales are those of SCALES: -0.1, 0.1 and -0.1 are the smallest.
    for client, gone in ((0, 1), (1, 0), (2, 2)):
        _, _, fit, up = turns[client]
        assert channels(fit.mask) == [at != gone for at in range(4)]
        for name in ("conv.weight", "norm.weight", "norm.bias"):
            assert not fit.mask[name][gone].any()
            assert fit.mask[name].reshape(4, -1).all(1).sum() == 3
        assert not fit.mask["fc.weight"][:, 2 * gone : 2 * gone + 2].any()
        assert up.mask == fit.mask


def test_single_weights_go_of_linear_layers_alone(small):
    fit = Personal(small, [replace(HYBRID, channel_sparsity=0.0), UNIFORM]).round()[0][2]
    assert fit.mask.counts() == {"conv.weight": 36, "norm.weight": 4, "norm.bias": 4, "fc.weight": 18, "fc.bias": 3}
    size = small.target(0)["fc.weight"].abs().flatten()
    assert fit.mask["fc.weight"].flatten().tolist() == (size >= size.sort().values[6]).tolist()


def test_each_kind_has_a_distance_of_its_own(small):
    weights = Personal(small, [replace(HYBRID, channel_distance=0.99), UNIFORM]).round()[0][2].mask
    assert channels(weights) == [True] * 4
    assert weights.counts()["fc.weight"] == 18
    units = Personal(small, [replace(HYBRID, distance=0.99), UNIFORM]).round()[0][2].mask
    assert channels(units) == [True, False, True, True]
    assert units.counts()["fc.weight"] == 18  # 3 outputs read 3 channels of 2 pixels
    neither = replace(HYBRID, distance=0.99, channel_distance=0.99)
    run = Personal(small, [neither, UNIFORM])
    assert run.round()[0][2].mask is None
    assert run.judged == []


def test_both_kinds_are_judged_together_and_end_at_their_targets(small):
    run = Personal(small, [HYBRID, UNIFORM], accuracy=0.5)
    assert all(fit.mask is None for _, _, fit, _ in run.round().values())
    run.accuracy, sizes = 0.6, {client: [] for client in range(3)}
    for _ in range(12):
        for client, (_, _, fit, _) in run.round().items():
            sizes[client].append((sum(channels(fit.mask)), fit.mask.counts()["fc.weight"]))
    for client in (0, 1):
        found = sizes[client]
        assert found == sorted(found, reverse=True)
        # A quarter of 4 channels less are 3, then comes the target; of 24 weights go those of 2 channels, and half.
        assert list(dict.fromkeys(kept for kept, _ in found)) == [3, 2]
        assert found[-1][1] == 6
    # Of the third client the smallest scale is the same after every epoch, so its channels stay.
    assert {kept for kept, _ in sizes[2]} == {4}
    assert sizes[2][-1][1] == 12
    before, more = run.known[0], [client for client, _ in run.more]
    run.round()
    assert run.known[0] == before
    assert [client for client, _ in run.more] == [*more, 2]


def test_clients_train_the_smaller_model_once_a_channel_is_gone(small):
    for wanted in (True, False):
        run = Personal(small, [replace(HYBRID, shrink=wanted), UNIFORM])
        assert not run.round()[0][1].shrink
        assert run.round()[0][1].shrink is wanted


def test_the_penalty_pulls_the_scales_alone_and_adds_to_what_is_there(small):
    params = Tree(MODEL.layout, torch.ones(MODEL.layout.size))
    params["norm.weight"].copy_(torch.tensor([2.0, -2.0, 0.0, 1.0]))
    pull = scale_signs(MODEL.structure, params, 0.5)
    assert pull["norm.weight"].tolist() == [0.5, -0.5, 0.0, 0.5]
    assert sum(int(pull[name].count_nonzero()) for name in pull) == 3
    run = Personal(small, [replace(HYBRID, penalty=0.25), UNIFORM])
    assert run.round()[0][1].drift["norm.weight"].tolist() == [0.25] * 4
    assert Personal(small, [replace(HYBRID, penalty=0.0), UNIFORM]).round()[0][1].drift is None
    policy, given = replace(HYBRID, penalty=0.25), Tree(MODEL.layout, torch.ones(MODEL.layout.size))
    ctx, server = run.ctx(1), small.server
    message = UNIFORM.send(server, policy.send(server, Message(), None, ctx), None, ctx)
    job = replace(small.job(), params=server.params, drift=given)
    assert policy.begin(message, job, None, ctx)[1].drift["norm.weight"].tolist() == [1.25] * 4


def test_statistics_of_channels_that_are_gone_return_as_they_were_received(small):
    run = Personal(small, [replace(HYBRID, distance=0.99), UNIFORM])
    for client, gone in ((1, 0), (2, 2)):
        down, _, _, up = run.round((client,))[client]
        for name in up["buffers"]:
            moved = up["buffers"][name] != down["buffers"][name]
            assert moved.tolist() == [at != gone for at in range(4)]


def test_a_model_without_scales_is_refused_before_anything_starts(world):
    run = replace(world.facts(HYBRID, UNIFORM, epochs=5.0), validation=0.2)
    HYBRID.check(run)
    HYBRID.check(replace(run, has_statistics=True))
    with pytest.raises(ConfigError, match=r"^pruner is subfedavg_hybrid; it ranks channels by the scales"):
        HYBRID.check(replace(run, has_statistics=False))
    with pytest.raises(ConfigError, match=r"^validation is 0; "):
        HYBRID.check(replace(run, validation=0.0))
    with pytest.raises(ConfigError, match=r"^trainer.epochs is 1; "):
        HYBRID.check(replace(run, epochs=1.0))
    HYBRID.check(replace(run, has_statistics=True, structure=MODEL.structure))
    for model, lack in ((chain(), "no channels here can be cut"), (residual(), "the channels of stem have none")):
        with pytest.raises(ConfigError) as caught:
            HYBRID.check(replace(run, has_statistics=True, structure=model.structure))
        assert str(caught.value) == (
            f"pruner is subfedavg_hybrid; it ranks channels by the scales of batch normalisation, and {lack}: set "
            "model=batchnorm_cnn, or pruner=subfedavg"
        )


def test_single_weights_go_down_to_their_share_of_what_the_channels_leave(small):
    run = Personal(small, [HYBRID, UNIFORM])
    for _ in range(16):
        run.round()
    for client, left in ((0, 12), (1, 12)):
        mask = run.known[client]
        # Two of four channels stay, with 2 * 2 columns of 3 outputs; half of these weights go.
        there = MODEL.structure.mask({"conv": torch.tensor(channels(mask))})
        assert there.counts()["fc.weight"] == left
        assert mask.counts()["fc.weight"] == left // 2
        assert not (mask.flat & ~there.flat).any()
    alone = Personal(small, [replace(HYBRID, channel_sparsity=0.0), UNIFORM])
    for _ in range(16):
        alone.round()
    assert alone.known[0].counts()["fc.weight"] == 12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sparsity", 1.0),
        ("channel_sparsity", -0.1),
        ("rate", 0.0),
        ("channel_rate", 1.0),
        ("distance", 1.0),
        ("channel_distance", -0.1),
        ("accuracy", 1.0),
        ("penalty", -1.0),
    ],
)
def test_a_bad_setting_is_refused(field, value):
    with pytest.raises(FieldError, match=f"^{field} is {value!r}; "):
        SubFedAvgHybrid(**{field: value})


def test_nothing_to_cut_is_training_without_masks(small):
    idle = replace(HYBRID, sparsity=0.0, channel_sparsity=0.0, penalty=0.0)
    run, plain = Personal(small, [idle, UNIFORM]), Personal(small, [UNIFORM])
    for _ in range(2):
        run.round()
        plain.round()
        assert equal(run.server.params, plain.server.params)
    assert run.more == run.judged == []
    assert idle.changes_masks(3) is False
    assert [HYBRID.changes_masks(number) for number in (0, 3)] == [False, None]
    assert HYBRID.sparsity_after(3) is None
