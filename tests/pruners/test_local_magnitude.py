import itertools
from dataclasses import replace

import pytest
import torch
from personal_worlds import Personal

from fedray.errors import ConfigError
from fedray.prune.regrow import drop
from fedray.pruners import LocalMagnitude, Magnitude
from fedray.round import FieldError, Fit, Message, Server, View
from fedray.strategies import FedAvg, FedSGD
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, equal, restrict

ONCE = LocalMagnitude(sparsity=0.5)
GRADUAL = LocalMagnitude(sparsity=0.8, schedule="linear", start=2, finish=8, every=3)
EXACT = {0: 52, 1: 52, 2: 52, 3: 52, 4: 52, 5: 31, 6: 31, 7: 31, 8: 10, 9: 10}
"""Kept of 52 after each round of GRADUAL: 0 of 0.8 at round 2, half of it at 5, all at 8."""


def total(run, mask):
    return sum(run.kept(mask).values()) if mask is not None else 52


def test_each_client_cuts_the_smallest_of_what_it_trained(world):
    run = Personal(world, [ONCE, FedAvg()])
    turns = run.round()
    for client, (down, job, fit, up) in turns.items():
        whole = world.train(job, down, client).params
        expected = drop(whole, Mask.full(world.layout), {"fc.weight": 20, "out.weight": 6}, names=world.prunable)
        assert fit.mask == up.mask == up.parts["delta"].support == expected
        assert equal(fit.params, restrict(whole, expected))
    assert len({fit.mask for _, _, fit, _ in turns.values()}) == 3


@pytest.mark.parametrize(("rule", "votes"), [("or", 2), ("and", 2), ("vote", 1), ("vote", 2), ("vote", 3)])
def test_the_server_merges_what_clients_hold_and_sends_one_mask_to_all(world, rule, votes):
    run = Personal(world, [replace(ONCE, merge=rule, votes=votes, reproject=False), FedAvg()])
    masks = torch.stack([fit.mask.flat for _, _, fit, _ in run.round().values()]).int().sum(0)
    needed = {"or": 1, "and": 3, "vote": votes}[rule]
    assert torch.equal(run.server.mask.flat, masks >= needed)
    assert not run.server.params.flat[~run.server.mask.flat].any()
    for _, job, fit, up in run.round().values():
        assert job.mask == fit.mask == up.mask == run.server.mask


def test_a_larger_vote_keeps_less(world):
    sizes = []
    for votes in (1, 2, 3):
        run = Personal(world, [replace(ONCE, merge="vote", votes=votes, reproject=False), FedAvg()])
        run.round()
        sizes.append(total(run, run.server.mask))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 26 > sizes[2]


@pytest.mark.parametrize("rule", ["or", "and", "vote"])
@pytest.mark.parametrize("allocation", ["uniform", "er", "erk"])
def test_reprojected_masks_have_the_counts_of_the_schedule_in_every_round(world, rule, allocation):
    policy = replace(GRADUAL, merge=rule, allocation=allocation)
    run = Personal(world, [policy, FedAvg()])
    masks = [run.server.mask]
    for number in range(1, 10):
        run.round()
        masks.append(run.server.mask)
        assert total(run, run.server.mask) == EXACT[number] == round((1 - policy.sparsity_after(number)) * 52)
    for number, (before, after) in enumerate(itertools.pairwise(masks), 1):
        moved = before != after
        assert moved <= policy.changes_masks(number)
        assert moved is (number in (5, 8))  # the event of round 2 removes nothing
        if before is not None:
            assert not (after.flat & ~before.flat).any()


HAND = Layout(("w",), ((6,),))


def hand(*values):
    return Tree(HAND, torch.tensor(values))


def settle_by_hand(world, policy, *clients):
    """The server's mask after a round in which clients with these weights (zeros are cut) answered."""
    server, sums = Server(params=hand(*[1.0] * 6), buffers=Tree.zeros(Layout((), ()))), Sums()
    ctx = replace(world.ctx(1), prunable=("w",), origin=server.params)
    for values in clients:
        mask = Mask(HAND, hand(*values).flat != 0)
        delta = restrict(Tree(HAND, hand(*values).flat - server.params.flat), mask)
        fit = Message().put("delta", FedAvg().upload(fit_of(delta, mask), Message(), delta).parts["delta"])
        sums.add(replace(fit, mask=mask))
    for one in (FedAvg(), policy):
        server, sums, _ = one.settle(server, sums, None, ctx)
    return server


def fit_of(delta, mask):
    none = Tree.zeros(Layout((), ()))
    facts = {"num_examples": 1, "num_steps": 1, "lr": 0.1, "loss": 0.0}
    return Fit(received=Message(), params=delta, buffers=none, mask=mask, **facts)


def test_merging_by_hand(world):
    clients = ((5.0, 4.0, 3.0, 0.0, 0.0, 0.0), (9.0, 0.0, 1.5, -2.5, 0.0, 0.0), (1.0, 0.0, 0.0, -8.5, 0.1, 0.0))
    bits = {
        ("or", False): "111110",
        ("and", False): "100000",
        ("vote", False): "101100",
        # Means over holders: 5, 4, 2.25, -5.5, 0.1, and the server's 1 of the last, which nobody holds.
        ("or", True): "110100",
        ("and", True): "110100",
        ("vote", True): "101100",
    }
    for (rule, reproject), expected in bits.items():
        policy = replace(ONCE, merge=rule, reproject=reproject)
        found = settle_by_hand(world, policy, *clients)
        assert "".join(str(int(bit)) for bit in found.mask.flat) == expected, (rule, reproject)
    means = settle_by_hand(world, replace(ONCE, reproject=False), *clients).params
    assert torch.allclose(means.flat, torch.tensor([5.0, 4.0, 2.25, -5.5, 0.1, 0.0]))


def test_a_round_that_nobody_answered_is_cut_by_the_servers_own_weights(world):
    assert settle_by_hand(world, ONCE).mask.counts() == {"w": 3}
    assert settle_by_hand(world, replace(ONCE, reproject=False)).mask is None


def test_personal_masks_stay_with_their_clients_and_late_ones_catch_up(world):
    run = Personal(world, [replace(GRADUAL, masks="personal"), FedAvg()])
    kept = {}
    for number in range(1, 10):
        clients = (0,) if number < 7 else (0, 1, 2)
        turns = run.round(clients)
        assert run.server.mask is None
        for client, (down, _, fit, up) in turns.items():
            assert total(run, fit.mask) == EXACT[number]
            assert up.mask == fit.mask == run.memories[client][0]
            assert down.mask == kept.get(client)
            kept[client] = fit.mask
    assert len(set(kept.values())) == 3
    for client in range(3):
        assert not run.turn(client)[0]["params"].flat[~kept[client].flat].any()


def test_a_client_runs_the_servers_weights_under_its_mask(world):
    whole = View(params=world.server.params, buffers=world.server.buffers, mask=None)
    policy = replace(ONCE, masks="personal")
    run = Personal(world, [policy, FedAvg()])
    fit = run.round()[1][2]
    view = policy.view(whole, run.memories[1][0], run.ctx(1))
    assert view.mask == fit.mask
    assert equal(view.params, restrict(whole.params, fit.mask))
    assert ONCE.view(whole, None, run.ctx(1)) is whole


def test_only_masks_of_their_own_need_downloads_of_their_own():
    assert replace(ONCE, masks="personal").sends_each
    assert not ONCE.sends_each


@pytest.mark.parametrize("rule", ["or", "and", "vote"])
def test_one_client_prunes_as_the_server_would(world, rule):
    local = Personal(world, [replace(GRADUAL, merge=rule), FedAvg()])
    central = Personal(world, [Magnitude(sparsity=0.8, schedule="linear", start=2, finish=8, every=3), FedAvg()])
    for _ in range(9):
        local.round((1,))
        central.round((1,))
        assert total(local, local.server.mask) == total(central, central.server.mask)
        if central.server.mask is not None:
            assert local.server.mask is None or local.server.mask == central.server.mask
        assert torch.allclose(local.server.params.flat, central.server.params.flat, atol=1e-6)


@pytest.mark.parametrize("masks", ["personal", "synchronised"])
def test_sparsity_zero_is_fedavg_bit_for_bit(world, masks):
    run, plain = Personal(world, [replace(ONCE, sparsity=0.0, masks=masks), FedAvg()]), Personal(world, [FedAvg()])
    for _ in range(3):
        run.round()
        plain.round()
        assert equal(run.server.params, plain.server.params)


def test_what_is_promised(world):
    assert [GRADUAL.changes_masks(number) for number in (0, 1, 2, 4, 5, 8, 9)] == [0, 0, 1, 0, 1, 1, 0]
    personal, merged = replace(GRADUAL, masks="personal"), replace(GRADUAL, reproject=False)
    assert [personal.changes_masks(number) for number in (1, 2, 9)] == [False, None, None]
    assert [one.sparsity_after(1) for one in (GRADUAL, personal, merged)] == [0.0] * 3
    assert [one.sparsity_after(9) for one in (GRADUAL, personal, merged)] == [0.8, None, None]


BAD = [
    ("sparsity", 1.0),
    ("allocation", "even"),
    ("schedule", "step"),
    ("start", 0),
    ("every", 0),
    ("masks", "global"),
    ("merge", "xor"),
    ("votes", 0),
    ("budget", "all"),
    ("rounding", "up"),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_bad_setting_is_refused(field, value):
    with pytest.raises(FieldError, match=f"^{field} is {value!r}; "):
        replace(ONCE, **{field: value})
    with pytest.raises(FieldError, match=r"^finish is 0; a cubic schedule ends after its start"):
        replace(ONCE, schedule="cubic")


def test_bad_company_is_refused_by_name(world):
    run = world.facts(GRADUAL, FedAvg())
    GRADUAL.check(run)
    with pytest.raises(ConfigError, match=r"^pruner.finish is 8; it must be at most rounds "):
        GRADUAL.check(replace(run, rounds=7))
    with pytest.raises(ConfigError, match=r"^pruner is local_magnitude; it needs a strategy "):
        GRADUAL.check(world.facts(GRADUAL, FedSGD()))
    vote = replace(GRADUAL, merge="vote", votes=4)
    with pytest.raises(FieldError, match=r"^votes is 4; it must be at most cohort \(3\)"):
        vote.check(run)
    vote.check(replace(run, cohort=4))
