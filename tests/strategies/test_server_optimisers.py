"""FedAvgM and the adaptive strategies against torch.optim, the paper's formulas, and under masks."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from quadratics import LAYOUT, Federation, context, draw, some, sums_of

from fedray.errors import ConfigError
from fedray.round import FieldError, Server
from fedray.strategies import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedDyn, FedNova, FedYogi
from fedray.sums import Sums
from fedray.tree import Mask, Tree, equal, restrict

ROUNDS = 6
OPTIMISERS = (FedAvgM(), FedAvgM(momentum=0.5, nesterov=True), FedAdagrad(), FedAdam(), FedYogi())
STATEFUL = (*OPTIMISERS, FedDyn())


def differences(number):
    return [Tree(LAYOUT, 0.3 * draw("delta", number, client).flat) for client in range(3)]


def server(mask=None):
    params = draw("origin")
    return Server(params=restrict(params, mask), buffers=Tree.zeros(type(LAYOUT)((), ())), mask=mask)


def settle(strategy, at, sums, memory, **facts):
    after, _, memory = strategy.settle(at, sums, memory, context(**facts))
    return after, memory


def by_torch(optimiser):
    """The parameters after each round where an optimiser of PyTorch takes the negative mean difference as gradient."""
    params = torch.nn.Parameter(draw("origin").flat.clone())
    steps, found = optimiser([params]), []
    for number in range(ROUNDS):
        params.grad = -torch.stack([delta.flat for delta in differences(number)]).double().mean(0).float()
        steps.step()
        found.append(params.detach().clone())
    return found


def by_strategy(strategy):
    at, memory, found = server(), None, []
    for number in range(ROUNDS):
        at, memory = settle(strategy, at, sums_of(*differences(number)), memory)
        found.append(at.params.flat)
    return found


ORACLES = {
    "FedAvg is SGD": (FedAvg(lr=0.7), lambda p: torch.optim.SGD(p, lr=0.7)),
    "FedAvgM is SGD with momentum": (FedAvgM(lr=0.7), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9)),
    "FedAvgM with nesterov": (
        FedAvgM(lr=0.3, momentum=0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8, nesterov=True),
    ),
    "FedAdagrad from zero": (
        FedAdagrad(lr=0.2, tau=0.01, initial="zero"),
        lambda p: torch.optim.Adagrad(p, lr=0.2, eps=0.01),
    ),
    "FedAdagrad from the paper's start": (
        FedAdagrad(lr=0.2, tau=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.2, eps=0.1, initial_accumulator_value=0.01),
    ),
    "FedAdam with bias correction": (
        FedAdam(lr=0.05, beta1=0.8, beta2=0.95, tau=0.01, initial="zero", bias_correction=True),
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=0.01),
    ),
}


@pytest.mark.parametrize("case", ORACLES)
def test_a_server_optimiser_is_that_of_pytorch_on_the_negative_mean_difference(case):
    strategy, optimiser = ORACLES[case]
    for mine, theirs in zip(by_strategy(strategy), by_torch(optimiser), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def by_the_paper(second, *, lr, beta1, tau, start):
    """Algorithm 2 of Reddi et al. 2021 in NumPy, float64."""
    params = draw("origin").flat.double().numpy()
    m, v, found = np.zeros_like(params), np.full_like(params, start), []
    for number in range(ROUNDS):
        delta = np.mean([d.flat.double().numpy() for d in differences(number)], axis=0)
        m = beta1 * m + (1 - beta1) * delta
        v = second(v, delta**2)
        params = params + lr * m / (np.sqrt(v) + tau)
        found.append(params)
    return found


@pytest.mark.parametrize("initial", ["tau_squared", "zero"])
@pytest.mark.parametrize("kind", [FedAdagrad, FedAdam, FedYogi])
def test_an_adaptive_strategy_is_the_papers_algorithm(kind, initial):
    seconds = {
        FedAdagrad: lambda v, square: v + square,
        FedAdam: lambda v, square: 0.9 * v + 0.1 * square,
        FedYogi: lambda v, square: v - 0.1 * square * np.sign(v - square),
    }
    strategy = kind(lr=0.3, beta1=0.6, tau=0.05, initial=initial, **({} if kind is FedAdagrad else {"beta2": 0.9}))
    start = 0.05**2 if initial == "tau_squared" else 0.0
    expected = by_the_paper(seconds[kind], lr=0.3, beta1=0.6, tau=0.05, start=start)
    for mine, theirs in zip(by_strategy(strategy), expected, strict=True):
        assert np.allclose(mine.numpy(), theirs, rtol=1e-4, atol=1e-5)


def test_without_momentum_fedavgm_is_fedavg_bit_for_bit():
    for mine, theirs in zip(by_strategy(FedAvgM(lr=0.7, momentum=0.0)), by_strategy(FedAvg(lr=0.7)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("strategy", [FedAvg(), FedNova(), *STATEFUL], ids=repr)
def test_the_servers_schedule_is_a_factor_on_the_strategys_rate(strategy):
    def first_move(chosen, factor):
        federation = Federation((chosen,))
        federation.round(1)
        sums = Sums()
        for answer in federation.uploads.values():
            sums.add(answer)
        after, _, _ = chosen.settle(server(), sums, None, context(server_lr=factor))
        return after.params

    assert equal(first_move(strategy, 0.5), first_move(replace(strategy, lr=0.5 * strategy.lr), 1.0))
    assert not equal(first_move(strategy, 0.5), first_move(strategy, 1.0))


# -- masks -----------------------------------------------------------------------------------------------------------


def state(memory):
    """The trees in a memory, by name."""
    if isinstance(memory, Tree):
        return {"h": memory}
    if isinstance(memory, dict):
        return {name: value for name, value in memory.items() if isinstance(value, Tree)}
    return {"first": memory[0]}


@pytest.mark.parametrize("strategy", STATEFUL, ids=repr)
def test_where_nobody_vouches_value_and_moments_stay(strategy):
    at, memory = settle(strategy, server(), sums_of(*differences(0)), None)
    silent = ~some(3).flat
    after, later = settle(strategy, at, sums_of(*differences(1), supports=[some(3)] * 3), memory)
    assert torch.equal(after.params.flat[silent], at.params.flat[silent])
    assert not torch.equal(after.params.flat[~silent], at.params.flat[~silent])
    for name, tree in state(later).items():
        assert torch.equal(tree.flat[silent], state(memory)[name].flat[silent])
        assert not torch.equal(tree.flat[~silent], state(memory)[name].flat[~silent])
    untouched, same = settle(strategy, at, Sums(), memory)
    assert untouched is at
    assert same is memory


@pytest.mark.parametrize("strategy", STATEFUL, ids=repr)
def test_what_leaves_the_mask_is_forgotten_and_what_grows_starts_without_momentum(strategy):
    wide, narrow = Mask.full(LAYOUT), some(5)
    at, memory = settle(strategy, server(wide), sums_of(*differences(0), supports=[wide] * 3), None)
    _, cut = settle(strategy, at.cut(narrow), sums_of(*differences(1), supports=[narrow] * 3), memory)
    for tree in state(cut).values():
        assert not tree.flat[~narrow.flat].any()
    # Everything is back, and its first difference there is zero: it must not move, for nothing is remembered.
    still = [restrict(delta, narrow) for delta in differences(2)]
    after, _ = settle(strategy, server(wide), sums_of(*still, supports=[wide] * 3), cut)
    assert torch.equal(after.params.flat[~narrow.flat], server(wide).params.flat[~narrow.flat])


@pytest.mark.parametrize("strategy", [FedAdagrad(), FedAdam(), FedYogi()], ids=repr)
def test_a_coordinate_that_grows_starts_at_the_mean_second_moment_of_its_tensor(strategy):
    wide, narrow = Mask.full(LAYOUT), some(5)
    _, memory = settle(strategy, server(narrow), sums_of(*differences(0), supports=[narrow] * 3), None)
    zeros = [Tree.zeros(LAYOUT)] * 3
    frozen = replace(strategy, **({"beta2": 0.0} if hasattr(strategy, "beta2") else {}))
    kept = memory["second"]
    if isinstance(strategy, FedAdam):
        frozen = strategy  # v decays by beta2 where the difference is zero
        kept = Tree(LAYOUT, kept.flat * strategy.beta2)
    _, later = settle(frozen, server(wide), sums_of(*zeros, supports=[wide] * 3), memory)
    for name, span in LAYOUT.spans.items():
        grown = ~narrow.flat[span]
        mean = kept.flat[span][~grown].mean()
        assert torch.allclose(later["second"].flat[span][grown], mean.expand(int(grown.sum())), rtol=1e-5), name
    # A new run's first step is (1 - beta1) d / (sqrt((1 - beta2) d^2 + tau^2) + tau): a grown one's is bounded alike.
    after, _ = settle(strategy, server(wide), sums_of(*differences(2), supports=[wide] * 3), memory)
    moved = (after.params.flat - server(wide).params.flat).abs()
    assert float(moved[~narrow.flat].max()) < 10 * float(moved[narrow.flat].max())


def test_a_tensor_that_was_empty_starts_at_the_strategys_own_second_moment():
    empty = Mask.of(LAYOUT, {"out.weight": torch.zeros(3, 4, dtype=torch.bool)})
    strategy = FedAdagrad(tau=0.5)
    _, memory = settle(strategy, server(empty), sums_of(*differences(0), supports=[empty] * 3), None)
    _, later = settle(strategy, server(Mask.full(LAYOUT)), sums_of(*[Tree.zeros(LAYOUT)] * 3), memory)
    assert torch.equal(later["second"]["out.weight"], torch.full((3, 4), 0.25))


@pytest.mark.parametrize("strategy", OPTIMISERS, ids=repr)
def test_clients_that_grow_beyond_the_servers_mask_are_heard(strategy):
    # As in a readjustment of FedDST: the server's weights there are zero, and it may keep what was found.
    narrow = some(5)
    beyond = Mask(LAYOUT, narrow.flat | some(6).flat)
    grown = beyond.flat & ~narrow.flat
    at, memory = settle(strategy, server(narrow), sums_of(*differences(0), supports=[narrow] * 3), None)
    after, later = settle(strategy, at, sums_of(*differences(1), supports=[beyond, narrow, narrow]), memory)
    assert bool((after.params.flat[grown] != 0).all())
    assert torch.isfinite(after.params.flat).all()
    assert all(not tree.flat[~beyond.flat].any() for tree in state(later).values())


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (FedAvgM, {"momentum": 1.0}, "momentum is 1.0; it is 0 to below 1"),
        (FedAvgM, {"lr": 0.0}, "lr is 0.0; it must be above 0"),
        (FedAvgM, {"momentum": 0.0, "nesterov": True}, "nesterov is True; there is no momentum to look ahead along"),
        (FedAdam, {"bias_correction": True}, "bias_correction is True; it corrects moments that start at zero"),
        (FedAdam, {"beta2": 1.0}, "beta2 is 1.0; it is 0 to below 1"),
        (FedYogi, {"beta1": -0.1}, "beta1 is -0.1; it is 0 to below 1"),
        (FedAdagrad, {"tau": 0.0}, "tau is 0.0; it must be above 0"),
        (FedAdagrad, {"initial": "one"}, "initial is 'one'; choose tau_squared or zero"),
        (FedYogi, {"lr": float("nan")}, "lr is nan; it must be above 0"),
        (FedNova, {"lr": -1.0}, "lr is -1.0; it must be above 0"),
        (FedDyn, {"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        (FedDyn, {"lr": 0.0}, "lr is 0.0; it must be above 0"),
    ],
)
def test_a_strategy_refuses_values_that_make_no_sense(kind, settings, sentence):
    with pytest.raises(FieldError) as caught:
        kind(**settings)
    assert isinstance(caught.value, ConfigError)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedNova])
def test_every_averaging_strategy_weights_by_examples_or_uniformly(kind):
    assert "weight_by" in {field.name for field in fields(kind)}
    with pytest.raises(FieldError, match="weight_by is 'size'; choose examples or uniform"):
        kind(weight_by="size")
    answers = [Federation((kind(weight_by=w),)).client(1, 1).parts["delta"].weight for w in ("examples", "uniform")]
    assert answers == [30.0, 1.0]
