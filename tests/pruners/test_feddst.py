import itertools
from dataclasses import replace

import pytest
import torch

from fedray.errors import ConfigError
from fedray.prune.allocate import erk
from fedray.pruners import FedDST
from fedray.round import Context, Fit, Message, Part, Server
from fedray.strategies import FedAvg, FedSGD
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, equal

LAYOUT = Layout(("w",), ((6,),))
NOTHING = Tree.zeros(Layout((), ()))
HAND = FedDST(sparsity=0.5, every=2, until=10, ratio=0.4, ratio_decay="constant", gradient_batch_size=8)


def tree_of(*values):
    return Tree(LAYOUT, torch.tensor(values))


def mask_of(*kept):
    return Mask(LAYOUT, torch.tensor([bool(bit) for bit in kept]))


def hand_context(world, number, probe=None):
    return replace(world.ctx(number), prunable=("w",), origin=Tree.zeros(LAYOUT), probe=probe)


def hand_fit(num_examples=5, num_steps=3):
    mask = mask_of(1, 1, 1, 0, 0, 0)
    received = Message(parts={"params": Part(value=tree_of(0.5, 0.5, 0.5, 0.0, 0.0, 0.0), support=mask)}, mask=mask)
    return Fit(
        received=received,
        params=tree_of(3.0, -0.1, 2.0, 0.0, 0.0, 0.0),
        buffers=NOTHING,
        mask=mask,
        num_examples=num_examples,
        num_steps=num_steps,
        lr=0.1,
        loss=0.0,
    )


def test_a_client_drops_the_smallest_and_grows_the_steepest_at_the_pruned_point_by_hand(world):
    asked = []

    def probe(*point, wants, batch_size):
        asked.append((point[2], wants, batch_size))
        return {}, {"grad": tree_of(9.0, 0.2, 8.0, 0.1, -0.7, 0.3)}

    ctx: Context = hand_context(world, 2, probe)
    fit, message, _ = HAND.end(hand_fit(), Message(), None, ctx)
    # 3 kept, ratio 0.4: round(1.8) = 2 stay, the weakest (-0.1) goes; -0.7 is the steepest that is dropped.
    assert asked == [(mask_of(1, 0, 1, 0, 0, 0), frozenset({"grad"}), 5)]
    assert fit.mask == mask_of(1, 0, 1, 0, 1, 0)
    assert equal(fit.params, tree_of(3.0, 0.0, 2.0, 0.0, 0.0, 0.0))
    fit, message, _ = FedAvg().end(fit, message, None, ctx)
    assert message.parts["delta"].support == message.mask == fit.mask
    assert equal(message["delta"], tree_of(2.5, 0.0, 1.5, 0.0, 0.0, 0.0))


def test_a_weight_that_is_dropped_and_grows_again_starts_at_zero(world):
    def probe(*_, **__):
        return {}, {"grad": tree_of(9.0, 5.0, 8.0, 0.1, -0.7, 0.3)}

    ctx = hand_context(world, 2, probe)
    fit, _, _ = HAND.end(hand_fit(), Message(), None, ctx)
    assert fit.mask == mask_of(1, 1, 1, 0, 0, 0)
    assert equal(fit.params, tree_of(3.0, 0.0, 2.0, 0.0, 0.0, 0.0))
    fit, _, _ = replace(HAND, regrow_dropped=False).end(hand_fit(), Message(), None, ctx)
    assert fit.mask == mask_of(1, 0, 1, 0, 1, 0)


@pytest.mark.parametrize(("wanted", "held", "asked"), [(8, 5, 5), (8, 20, 8), (None, 20, None)])
def test_the_growth_gradient_takes_a_batch_or_all_that_a_client_has(world, wanted, held, asked):
    sizes = []

    def probe(*_, batch_size, **__):
        sizes.append(batch_size)
        return {}, {"grad": tree_of(0.0, 0.0, 0.0, 1.0, 2.0, 3.0)}

    policy = replace(HAND, gradient_batch_size=wanted)
    policy.end(hand_fit(num_examples=held), Message(), None, hand_context(world, 2, probe))
    assert sizes == [asked]


@pytest.mark.parametrize("number", [1, 3, 10, 12])
def test_outside_readjustment_rounds_nothing_changes(world, number):
    fit, message = hand_fit(), Message()
    assert HAND.end(fit, message, None, hand_context(world, number)) == (fit, message, None)
    server = Server(params=fit.params, buffers=NOTHING, mask=fit.mask)
    wide = Sums().add(Message(parts={"delta": Part(value=Tree.zeros(LAYOUT))}))
    assert HAND.settle(server, wide, None, hand_context(world, number))[0] is server


def test_a_client_that_took_no_step_keeps_its_mask(world):
    fit = hand_fit(num_steps=0)
    assert HAND.end(fit, Message(), None, hand_context(world, 2))[0] is fit


def test_the_server_averages_over_holders_and_keeps_the_largest_of_the_union_by_hand(world):
    mask = mask_of(1, 1, 1, 0, 0, 0)
    server = Server(params=tree_of(1.0, 1.0, 1.0, 0.0, 0.0, 0.0), buffers=NOTHING, mask=mask)
    a, b = mask_of(1, 0, 1, 1, 0, 0), mask_of(1, 0, 0, 1, 1, 0)
    sums = Sums()
    sums.add(Message(parts={"delta": Part(value=tree_of(1.0, 0.0, -0.8, 0.6, 0.0, 0.0), weight=1.0, support=a)}))
    sums.add(Message(parts={"delta": Part(value=tree_of(4.0, 0.0, 0.0, 0.2, -0.1, 0.0), weight=3.0, support=b)}))
    ctx = hand_context(world, 2)
    server, _, _ = FedAvg().settle(server, sums, None, ctx)
    server, _, _ = HAND.settle(server, sums, None, ctx)
    # Means: 1 + (1 + 3*4)/4 = 4.25; nobody holds the second, so its 1.0 goes; 0.2; (0.6 + 3*0.2)/4 = 0.3; -0.1.
    assert server.mask == mask_of(1, 0, 1, 1, 0, 0)
    assert torch.allclose(server.params.flat, torch.tensor([4.25, 0.0, 0.2, 0.3, 0.0, 0.0]))


def test_a_round_that_nobody_answered_keeps_the_mask(world):
    server = Server(params=hand_fit().params, buffers=NOTHING, mask=hand_fit().mask)
    assert HAND.settle(server, Sums(), None, hand_context(world, 2))[0] is server


def test_counts_per_layer_stay_those_of_erk_while_the_mask_moves(world):
    pruner = FedDST(sparsity=0.6, every=2, until=7)
    servers = world.run([pruner, FedAvg()], 8)
    counts = erk(world.layout, world.prunable, 0.6)
    assert all(server.mask.counts(world.prunable) == counts for server in servers)
    moved = [before.mask != after.mask for before, after in itertools.pairwise(servers)]
    assert moved[1]
    assert not any(moved[at] for at in (0, 2, 4, 6, 7))


def test_every_upload_of_a_readjustment_keeps_the_counts_and_holds_what_it_trained(world):
    policies = [FedDST(sparsity=0.6, every=1, until=9), FedAvg()]
    server = world.start(*policies)
    masks = [world.answer(policies, server, 1, client)[2].mask for client in range(3)]
    assert all(mask.counts() == server.mask.counts() for mask in masks)
    assert len(set(masks)) == 3


def test_the_cosine_shrinks_what_is_swapped_as_rounds_pass(world):
    policy = FedDST(sparsity=0.5, every=1, until=100, ratio=0.5)
    fit = world.answer([FedAvg()], world.start(policy), 1, 0)[1]
    dropped = []

    def probe(params, buffers, mask, *, wants, batch_size):
        dropped.append(sum(fit.mask.counts(world.prunable).values()) - sum(mask.counts(world.prunable).values()))
        return world.probe(0)(params, buffers, mask, wants=wants, batch_size=batch_size)

    for number in (1, 50, 99):
        policy.end(fit, Message(), None, replace(world.ctx(number, 0), probe=probe))
    assert dropped == [12, 6, 0]  # 17 + 9 are kept; the ratios are 0.4999, 0.25 and 0.0001
    dropped.clear()
    replace(policy, ratio_decay="constant").end(fit, Message(), None, replace(world.ctx(99, 0), probe=probe))
    assert dropped == [14]  # round(8.5) = 8 and round(4.5) = 4 stay


def test_the_first_mask_is_that_of_the_largest_weights_or_a_random_one(world):
    by_size, drawn = (world.start(FedDST(sparsity=0.7, initial=way)) for way in ("magnitude", "random"))
    for name in world.prunable:
        weights, kept = world.server.params[name].abs(), by_size.mask[name]
        assert weights[kept].min() > weights[~kept].max()
    assert by_size.mask.seed is None
    assert drawn.mask.seed is not None
    assert drawn.mask.counts() == by_size.mask.counts()


def test_a_strategy_without_differences_is_refused(world):
    HAND.check(world.facts(HAND, FedAvg()))
    with pytest.raises(ConfigError) as caught:
        HAND.check(world.facts(HAND, FedSGD()))
    assert str(caught.value) == ("pruner is feddst; it needs a strategy that sends part 'delta': set strategy=fedavg")
