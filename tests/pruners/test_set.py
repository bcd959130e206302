import itertools
from dataclasses import replace

import torch

from fedray.keys import Key
from fedray.prune.allocate import er
from fedray.pruners import SET
from fedray.round import Message, Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, equal

LAYOUT = Layout(("w", "bias"), ((8,), (1,)))
NOTHING = Tree.zeros(Layout((), ()))
HAND = SET(sparsity=0.5, every=2, until=10, ratio=0.5)


def settled(world, number, seed=0, policy=HAND):
    mask = Mask(LAYOUT, torch.tensor([True] * 4 + [False] * 4 + [True]))
    params = Tree(LAYOUT, torch.tensor([3.0, -0.1, 0.2, 2.0, 0.0, 0.0, 0.0, 0.0, 7.0]))
    server = Server(params=params, buffers=NOTHING, mask=mask)
    ctx = replace(world.ctx(number), prunable=("w",), key=Key.of(seed).fold("round", number))
    return server, policy.settle(server, Sums(), None, ctx)[0]


def test_the_smallest_go_and_as_many_are_drawn_from_what_was_away_by_hand(world):
    before, after = settled(world, 2)
    # floor(0.5 * 4) = 2 swap: -0.1 and 0.2.
    assert after.mask.flat[:4].tolist() == [True, False, False, True]
    assert int(after.mask.flat[4:8].sum()) == 2
    assert after.params.flat.tolist() == [3.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 7.0]
    assert bool(after.mask.flat[8])
    assert before.mask.counts() == after.mask.counts()


def test_every_weight_that_is_away_is_drawn_equally_often(world):
    drawn = torch.stack([settled(world, 2, seed)[1].mask.flat[4:8] for seed in range(600)]).sum(0)
    # 600 draws of 2 among 4: 300 each, and four standard deviations are 49.
    assert all(abs(int(count) - 300) <= 49 for count in drawn)


def test_a_draw_is_a_function_of_the_seed_and_the_round(world):
    def mask(*facts):
        return settled(world, *facts)[1].mask

    assert mask(2, 5) == mask(2, 5)
    assert len({mask(number, 5).digest for number in (2, 4, 6, 8)}) > 1


def test_between_swaps_and_after_the_last_the_mask_rests(world):
    for number in (1, 3, 10, 12):
        before, after = settled(world, number)
        assert after is before


def test_the_mask_moves_by_exactly_what_the_ratio_says_and_rests_between(world):
    pruner = SET(sparsity=0.6, every=2, until=7, ratio=0.3)
    servers = world.run([pruner, FedAvg()], 8)
    counts = er(world.layout, world.prunable, 0.6)
    assert counts == {"fc.weight": 14, "out.weight": 7}
    assert all(server.mask.counts(world.prunable) == counts for server in servers)
    moved = [
        [int((before.mask[name] & ~after.mask[name]).sum()) for name in world.prunable]
        for before, after in itertools.pairwise(servers)
    ]
    # The ratio is constant: floor(0.3 * 14) and floor(0.3 * 7).
    assert moved == [[4, 2] if number in (2, 4, 6) else [0, 0] for number in range(1, 9)]
    cosine = world.run([replace(pruner, ratio_decay="cosine"), FedAvg()], 8)
    # 0.15 * (1 + cos(pi 6 / 7)) = 0.0149 swaps none of 14.
    assert cosine[5].mask == cosine[6].mask


def test_nothing_more_is_sent_than_without_it(world):
    policies = [SET(sparsity=0.6, every=1, until=9), FedAvg()]
    fit_parts = world.answer(policies, world.start(*policies), 2, 0)[2].parts
    assert set(fit_parts) == {"delta", "buffers"}
    assert policies[0].parts(world.layout, world.stats) == {}
    assert policies[0].send(world.server, Message(), None, world.ctx(2, 0)) == Message()


def test_sparsity_zero_is_the_dense_run_bit_for_bit(world):
    dense = world.run([FedAvg()], 4)
    run = world.run([SET(sparsity=0.0, every=1, until=9), FedAvg()], 4)
    assert all(equal(a.params, b.params) for a, b in zip(dense, run, strict=True))
