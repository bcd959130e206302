"""Over whom a coordinate is averaged: holders, or everybody who answered."""

import itertools
from dataclasses import replace

import pytest
import torch
from laws_support import population, run, spec

from fedray.keys import Key
from fedray.pruners import LocalMagnitude, Random
from fedray.round import FieldError, Fit, Message, Part, Server
from fedray.strategies import FedAvg
from fedray.strategies.differences import mean_difference
from fedray.strategies.model_parts import send_model
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, equal, restrict

LAYOUT = Layout(("w", "b"), ((5,), (1,)))
NONE = Layout((), ())
HOLDERS, ALL = FedAvg(), FedAvg(average="all")


def tree_of(*values):
    return Tree(LAYOUT, torch.tensor(values))


def upload(policy, num_examples, delta, kept):
    mask = None if kept is None else Mask(LAYOUT, torch.tensor([bool(bit) for bit in kept]))
    start = Message(parts={"params": Part(value=Tree.zeros(LAYOUT))})
    facts = {"num_examples": num_examples, "num_steps": 1, "lr": 0.1, "loss": 0.0, "buffers": Tree.zeros(NONE)}
    fit = Fit(received=start, params=restrict(delta, mask), mask=mask, **facts)
    return policy.end(fit, Message(), None, None)[1]


CLIENTS = (
    (10, tree_of(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (1, 1, 1, 0, 0, 1)),
    (30, tree_of(5.0, 6.0, 7.0, 8.0, 9.0, 2.0), (1, 1, 0, 1, 0, 1)),
    (60, tree_of(-1.0, 0.0, 0.0, 0.5, 0.0, 1.0), (1, 0, 0, 1, 0, 1)),
)


def after(policy, clients=CLIENTS, order=None):
    server, sums = Server(params=tree_of(10.0, 20.0, 30.0, 40.0, 50.0, 60.0), buffers=Tree.zeros(NONE)), Sums()
    for at in order or range(len(clients)):
        sums.add(upload(policy, *clients[at]))

    class Ctx:
        server_lr = 1.0

    return policy.settle(server, sums, None, Ctx)[0].params


def test_over_holders_and_over_all_by_hand():
    # Holders: (10 + 150 - 60) / 100, (20 + 180) / 40, 3, (240 + 30) / 90, none, (60 + 60 + 60) / 100.
    expected = [10 + 1.0, 20 + 5.0, 30 + 3.0, 40 + 3.0, 50.0, 60 + 1.8]
    assert torch.allclose(after(HOLDERS).flat, torch.tensor(expected))
    # All: the same sums over 100.
    expected = [10 + 1.0, 20 + 2.0, 30 + 0.3, 40 + 2.7, 50.0, 60 + 1.8]
    assert torch.allclose(after(ALL).flat, torch.tensor(expected))
    once = [10 + 5 / 3, 20 + 8 / 3, 30 + 1.0, 40 + 8.5 / 3, 50.0, 60 + 3.0]
    assert torch.allclose(after(replace(ALL, weight_by="uniform")).flat, torch.tensor(once))


@pytest.mark.parametrize("policy", [HOLDERS, ALL])
def test_where_nobody_holds_the_servers_value_stays_bit_for_bit(policy):
    assert float(after(policy)["w"][4]) == 50.0


@pytest.mark.parametrize("policy", [HOLDERS, ALL, replace(ALL, weight_by="uniform")])
def test_the_order_of_clients_changes_no_bit(policy):
    random = Key.of(3).numpy()
    clients = [
        (int(random.integers(1, 99)), tree_of(*random.normal(size=6).astype("float32").tolist()), kept)
        for kept in itertools.product((0, 1), repeat=6)
        if any(kept)
    ]
    first = after(policy, clients)
    for seed in range(3):
        order = Key.of(seed).permutation(len(clients)).tolist()
        assert equal(after(policy, clients, order), first)


@pytest.mark.parametrize("kept", [None, (1, 0, 1, 1, 0, 1)])
def test_equal_masks_give_the_same_bits_by_both_rules(kept):
    clients = [(count, delta, kept) for count, delta, _ in CLIENTS]
    assert equal(after(ALL, clients), after(HOLDERS, clients))


def test_over_all_nothing_shrinks_that_few_hold():
    still = [(1, Tree.zeros(LAYOUT), kept) for _, _, kept in CLIENTS]
    assert equal(after(ALL, still), tree_of(10.0, 20.0, 30.0, 40.0, 50.0, 60.0))


def test_the_vote_is_sent_only_where_it_is_read():
    assert set(upload(HOLDERS, *CLIENTS[0]).parts) == {"delta"}
    message = upload(ALL, *CLIENTS[0])
    assert set(message.parts) == {"delta", "votes"}
    assert message.parts["votes"].weight == 10.0
    assert set(ALL.parts(LAYOUT, NONE)) - set(HOLDERS.parts(LAYOUT, NONE)) == {"votes"}


def test_a_mean_over_all_is_the_sum_over_the_weight_of_all():
    sums = Sums()
    for client in CLIENTS:
        sums.add(upload(ALL, *client))
    exact = sum(count * upload(ALL, count, delta, kept)["delta"].flat.double() for count, delta, kept in CLIENTS) / 100
    assert torch.allclose(mean_difference(sums, "all").flat.double(), exact, rtol=3e-7, atol=0.0)


def test_another_rule_is_refused():
    with pytest.raises(FieldError, match=r"^average is 'most'; choose holders or all$"):
        FedAvg(average="most")


def test_a_mask_that_a_policy_further_in_put_into_the_message_is_the_one_that_is_sent():
    server = Server(params=tree_of(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), buffers=Tree.zeros(NONE))
    mask = Mask(LAYOUT, torch.tensor([True, False, True, True, True, True]))
    own = send_model(server, Message(mask=mask))
    assert own.mask is own.parts["params"].support is mask
    assert equal(own["params"], tree_of(1.0, 0.0, 3.0, 4.0, 5.0, 6.0))
    shared = send_model(server, Message())
    assert shared.parts["params"].value is server.params
    assert shared.mask is None


@pytest.mark.parametrize("pruner", [Random(sparsity=0.6), LocalMagnitude(sparsity=0.0)])
def test_runs_with_one_mask_for_all_end_in_the_same_bits(pruner):
    one, two = (run(spec(pruner, policy), population()) for policy in (HOLDERS, ALL))
    assert one.digests == two.digests
    assert one.rows[-1]["wire/up_bytes"] < two.rows[-1]["wire/up_bytes"]


def test_runs_with_masks_of_their_own_do_not():
    pruner = LocalMagnitude(sparsity=0.6, masks="personal")
    one, two = (run(spec(pruner, policy), population()) for policy in (HOLDERS, ALL))
    assert one.digests[0] != two.digests[0]
