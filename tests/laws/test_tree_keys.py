"""Trees and masks are values over one flat buffer; keys are a pure function of seed and names."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from laws_support import MODELS, population, run, spec
from scipy import stats

from fedray import tree
from fedray.keys import Key
from fedray.prune.select import random_mask
from fedray.pruners import FedDST, Magnitude, Random
from fedray.sim.client import Worker
from fedray.strategies import FedAvg
from fedray.tree import Layout, Mask, Tree, restrict

LAYOUT = Layout(("w", "b", "s"), ((3, 4), (4,), ()))


def values(*names):
    return Tree(LAYOUT, torch.randn(LAYOUT.size, generator=Key.of(0).fold(*names).torch()))


def some_mask(seed=0):
    return Mask(LAYOUT, torch.rand(LAYOUT.size, generator=Key.of(seed).torch()) < 0.5)


# -- trees -----------------------------------------------------------------------------------------------------------


def test_named_views_lie_in_the_flat_buffer_in_layout_order_and_write_through():
    mine = values("x")
    assert [name for name, _ in mine.items()] == list(mine) == ["w", "b", "s"]
    assert [tuple(view.shape) for _, view in mine.items()] == list(LAYOUT.shapes)
    assert torch.equal(torch.cat([view.reshape(-1) for _, view in mine.items()]), mine.flat)
    mine["b"][1] = 42.0
    assert mine.flat[13] == 42.0
    mine.flat[0] = -7.0
    assert mine["w"][0, 0] == -7.0
    assert len(mine) == 3


def test_a_layout_knows_which_tensor_holds_a_position():
    assert [LAYOUT.locate(at) for at in (0, 11, 12, 15, 16)] == ["w", "w", "b", "b", "s"]
    assert LAYOUT.size == sum(LAYOUT.sizes) == 17
    with pytest.raises(IndexError):
        LAYOUT.locate(17)
    assert LAYOUT.select(["s", "w"]) == Layout(("w", "s"), ((3, 4), ()))
    with pytest.raises(ValueError, match="no name twice"):
        Layout(("a", "a"), ((1,), (1,)))


def test_what_does_not_fit_its_layout_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        Tree(LAYOUT, torch.zeros(16))
    with pytest.raises(ValueError, match="booleans"):
        Mask(LAYOUT, torch.zeros(17))


def test_outside_the_mask_there_is_positive_zero_whatever_was_there():
    dirty = values("x")
    dirty.flat[0], dirty.flat[1], dirty.flat[2], dirty.flat[3] = float("nan"), -1.0, float("inf"), -0.0
    cut = restrict(dirty, Mask.of(LAYOUT, {"w": torch.zeros(3, 4, dtype=torch.bool)}))
    assert not cut.flat[:12].view(torch.int32).any()  # every bit: neither -0.0 nor NaN
    assert torch.equal(cut.flat[12:], dirty.flat[12:])
    assert restrict(dirty, None) is dirty


def test_operations_leave_their_arguments_alone_and_compute_what_they_say():
    a, b = values("a"), values("b")
    before = a.flat.clone(), b.flat.clone()
    torch.testing.assert_close(tree.add(a, b, 0.5).flat, a.flat + 0.5 * b.flat)
    torch.testing.assert_close(tree.sub(a, b).flat, a.flat - b.flat)
    torch.testing.assert_close(tree.scale(a, 3.0).flat, 3.0 * a.flat)
    assert tree.norm(a) == pytest.approx(float(a.flat.double().pow(2).sum().sqrt()), rel=1e-12)
    restrict(a, some_mask())
    assert torch.equal(a.flat, before[0])
    assert torch.equal(b.flat, before[1])


def test_equal_means_equal_bits():
    a = values("a")
    assert tree.equal(a, Tree(LAYOUT, a.flat.clone()))
    zero = Tree.zeros(LAYOUT)
    assert not tree.equal(zero, Tree(LAYOUT, -zero.flat))
    nan = Tree(LAYOUT, torch.full((17,), float("nan")))
    assert tree.equal(nan, Tree(LAYOUT, nan.flat.clone()))


# -- masks -----------------------------------------------------------------------------------------------------------


def test_counts_and_sparsity_are_those_of_the_named_tensors():
    mask = Mask.of(LAYOUT, {"w": torch.arange(12).view(3, 4) < 3, "b": torch.tensor([True, False, False, False])})
    assert mask.counts() == {"w": 3, "b": 1, "s": 1}
    assert mask.counts(["b"]) == {"b": 1}
    assert mask.sparsity() == pytest.approx(12 / 17)
    assert mask.sparsity(("w",)) == pytest.approx(0.75)
    assert mask.sparsity(()) == 0.0
    assert mask.indices.tolist() == [0, 1, 2, 12, 16]


def test_masks_are_equal_exactly_where_their_digests_are():
    one, two = some_mask(1), some_mask(1)
    assert one == two
    assert one.digest == two.digest
    assert hash(one) == hash(two)
    for at in range(LAYOUT.size):
        flat = one.flat.clone()
        flat[at] = ~flat[at]
        assert Mask(LAYOUT, flat).digest != one.digest
        assert Mask(LAYOUT, flat) != one


def test_masks_combine_coordinate_by_coordinate():
    a, b = some_mask(1), some_mask(2)
    assert torch.equal((a & b).flat, a.flat & b.flat)
    assert torch.equal((a | b).flat, a.flat | b.flat)
    assert torch.equal((~a).flat, ~a.flat)
    assert Mask.full(LAYOUT).sparsity() == 0.0


def test_pickling_keeps_bits_seed_and_digest():
    dirty = values("x")
    dirty.flat[0], dirty.flat[1] = float("nan"), -0.0
    assert tree.equal(pickle.loads(pickle.dumps(dirty)), dirty)
    drawn = random_mask(LAYOUT, ("w",), {"w": 5}, Key.of(4))
    back = pickle.loads(pickle.dumps(drawn))
    assert back == drawn
    assert back.seed == drawn.seed == (Key.of(4).digest, (5,), ("w",))
    assert back.digest == drawn.digest
    # A mask travels as bits, an eighth of its bytes.
    big = Layout(("x",), ((80_000,),))
    assert len(pickle.dumps(Mask.full(big))) < 11_000


# -- keys ------------------------------------------------------------------------------------------------------------


def draws(key):
    return (
        key.digest,
        key.numpy().random(4).tolist(),
        torch.rand(4, generator=key.torch()).tolist(),
        key.permutation(9).tolist(),
    )


def test_a_key_is_pure():
    key = Key.of(5).fold("round", 3)
    first = draws(key)
    Key.of(5).fold("elsewhere").numpy().random(100)
    torch.manual_seed(1)
    assert draws(key) == draws(Key.of(5).fold("round", 3)) == first
    assert draws(Key.of(5).fold("round").fold(3)) != []


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (("ab", "c"), ("a", "bc")),
        ((1,), ("1",)),
        (("a",), ("a", "")),
        ((1, 2), (2, 1)),
        ((12,), (1, 2)),
        (("a", "b"), ("astr:b",)),
        ((), ("a",)),
        ((-1,), (1,)),
        (("round", 1, "client", 11), ("round", 11, "client", 1)),
    ],
    ids=repr,
)
def test_different_names_have_different_streams(one, two):
    a, b = draws(Key.of(0).fold(*one)), draws(Key.of(0).fold(*two))
    assert all(mine != theirs for mine, theirs in zip(a, b, strict=True))


def test_different_seeds_have_different_streams():
    firsts = [tuple(Key.of(seed).fold("x").numpy().random(2)) for seed in range(200)]
    assert len(set(firsts)) == 200
    assert stats.kstest([first for first, _ in firsts], "uniform").pvalue > 0.001


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_the_names_that_those_of_python_are(kind):
    assert Key.of(3).fold("client", kind(7)) == Key.of(3).fold("client", 7)
    assert Key.of(kind(3)) == Key.of(3)


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    draws(Key.of(1))
    Worker(spec(), population())
    run(spec(rounds=1), population())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


# -- what follows from keys ------------------------------------------------------------------------------------------


def test_a_cohort_is_a_function_of_seed_and_round_without_replacement():
    one, two = spec(cohort=4), spec(Magnitude(sparsity=0.5), FedAvg(), cohort=4, lr=0.7)
    sizes = np.array([5] * 6)
    cohorts = [one.sample_cohort(round, sizes) for round in range(1, 40)]
    assert cohorts == [two.sample_cohort(round, sizes) for round in range(1, 40)]
    assert cohorts != [spec(cohort=4, seed=1).sample_cohort(round, sizes) for round in range(1, 40)]
    assert len(set(cohorts)) > 5
    for cohort in cohorts:
        assert list(cohort) == sorted(set(cohort))
        assert len(cohort) == 4
    assert {client for cohort in cohorts for client in cohort} == set(range(6))


@pytest.mark.parametrize("model", MODELS)
def test_two_methods_at_one_seed_start_from_the_same_weights(model):
    a, b = (
        Worker(spec(*policies, model=model), population(model)) for policies in ((), (FedDST(sparsity=0.5), FedAvg()))
    )
    assert tree.equal(a.origin, b.origin)
    assert tree.equal(a.origin_buffers, b.origin_buffers)
    other = Worker(spec(model=model, seed=1), population(model))
    assert not tree.equal(a.origin, other.origin)


def test_two_methods_at_one_seed_see_the_same_cohorts_and_batches(monkeypatch):
    from fedray.train import Samples

    taken = []
    original = Samples.take

    def take(self, positions, device):
        taken.append((self.index.tolist(), positions.tolist()))
        return original(self, positions, device)

    monkeypatch.setattr(Samples, "take", take)
    seen = []
    for policies in ((), (Random(sparsity=0.5), FedAvg(weight_by="uniform"))):
        ran = run(spec(*policies, epochs=2), population())
        seen.append((taken[:], [[c["client"] for c in record.clients] for record in ran.records]))
        taken.clear()
    assert seen[0] == seen[1]
    # Every epoch of every client has a permutation of its own.
    orders = [(tuple(index), tuple(order)) for index, order in seen[0][0] if len(index) > 4]
    assert len(set(orders)) > len(orders) - 3
    for index, order in seen[0][0]:
        assert sorted(order) == list(range(len(index)))
    assert len(seen[0][0]) == 4 * 4 * 2


def test_batches_do_not_depend_on_who_else_is_in_the_cohort():
    whole, pair = (Worker(spec(), population()) for _ in range(2))
    from fedray.round import Server
    from fedray.sim.client import Broadcast

    server = Server(params=whole.origin, buffers=whole.origin_buffers)
    broadcast = Broadcast(round=1, server=server, memories=(None, None), cohort=(0, 1, 2, 4))
    uploads = {}
    for worker, members in ((whole, (4, 0, 2)), (pair, (2,))):
        for client in members:
            uploads.setdefault(client, []).append(worker.train(broadcast, (client,), {})[0].payload)
    assert len(set(uploads[2])) == 1
    assert len({payloads[0] for payloads in uploads.values()}) == 3


def test_all_names_of_a_run_are_different_streams():
    keys = [Key.of(0).fold("round", r, "client", c) for r, c in itertools.product(range(30), range(30))]
    assert len({key.digest for key in keys}) == 900
    assert len({key.seed for key in keys}) == 900
