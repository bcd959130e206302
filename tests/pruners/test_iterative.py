from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from yaml_checks import check_file, facts

from fedray.errors import ConfigError
from fedray.pruners import Iterative
from fedray.round import FieldError, Server
from fedray.strategies import FedAvg
from fedray.sums import Sums
from fedray.tree import Layout, Tree, equal, restrict

# Two events of 0.2 each.
TWICE = Iterative(sparsity=1 - 0.8**2, start=2, finish=4, every=2)


def run(world, policy, rounds):
    """The server after each round, with the policy's memory passed on."""
    fedavg = FedAvg()
    server, memory = policy.init_server(world.server, world.ctx(0))
    servers = [server]
    for number in range(1, rounds + 1):
        sums = Sums()
        for client in range(3):
            sums.add(world.answer([fedavg], server, number, client)[2])
        server, sums, _ = fedavg.settle(server, sums, None, world.ctx(number))
        server, sums, memory = policy.settle(server, sums, memory, world.ctx(number))
        servers.append(server)
    return servers


def test_two_events_of_a_fifth_leave_0_64_of_each_layer_and_the_initial_weights_bit_for_bit(world):
    servers = run(world, TWICE, 5)
    origin = world.server
    for number, share in ((2, 0.8), (4, 0.64)):
        counts = servers[number].mask.counts(world.prunable)
        assert abs(counts["fc.weight"] - share * 40) <= 1
        assert abs(counts["out.weight"] - share * 12) <= 1
        assert world.kept(servers[number]) == round(share * 52)
        # Biases and statistics too.
        assert equal(servers[number].params, restrict(origin.params, servers[number].mask))
        assert equal(servers[number].buffers, origin.buffers)
    assert not torch.equal(servers[3].params.flat, servers[2].params.flat)
    assert servers[3].mask == servers[2].mask
    assert servers[5].mask == servers[4].mask
    assert not (servers[4].mask.flat & ~servers[2].mask.flat).any()


def test_what_goes_is_the_smallest_of_the_trained_weights_and_not_of_the_initial_ones(world):
    policy = replace(TWICE, start=1, finish=1, sparsity=0.5)
    dense = world.run([FedAvg()], 1)[-1]
    server = run(world, policy, 1)[-1]
    for name in world.prunable:
        module = nn.Linear(*reversed(world.layout.shape(name)))
        module.weight.data = dense.params[name].clone()
        prune.l1_unstructured(module, "weight", amount=module.weight.numel() // 2)
        assert torch.equal(server.mask[name], module.weight_mask.bool())
    initial = world.start(replace_by_magnitude())
    assert server.mask != initial.mask


def replace_by_magnitude():
    from fedray.pruners import Magnitude

    return Magnitude(sparsity=0.5)


def test_weights_go_back_to_those_after_the_round_that_is_named(world):
    policy = replace(TWICE, rewind_to=1)
    servers = run(world, policy, 4)
    for number in (2, 4):
        assert equal(servers[number].params, restrict(servers[1].params, servers[number].mask))
        assert equal(servers[number].buffers, servers[1].buffers)
    assert not torch.equal(servers[1].params.flat, world.server.params.flat)
    assert not torch.equal(servers[1].buffers.flat, world.server.buffers.flat)


def test_without_rewinding_training_goes_on_from_what_is_left(world):
    servers = run(world, replace(TWICE, rewind_to=None), 2)
    dense = world.run([FedAvg()], 2)[-1]
    assert equal(servers[2].params, restrict(dense.params, servers[2].mask))
    assert equal(servers[2].buffers, dense.buffers)


def test_a_global_ranking_divides_the_same_count_otherwise(world):
    local, whole = (run(world, replace(TWICE, ranking=ranking), 2)[-1] for ranking in ("local", "global"))
    assert world.kept(local) == world.kept(whole)
    assert local.mask.counts() != whole.mask.counts()


def test_each_event_removes_the_same_fraction_and_the_promise_is_kept(world):
    policy = Iterative(sparsity=0.8, start=1, finish=4)
    servers = run(world, policy, 6)
    kept = [52 if server.mask is None else world.kept(server) for server in servers]
    assert kept == [52, *(round(52 * 0.2 ** (i / 4)) for i in (1, 2, 3, 4)), 10, 10]
    assert kept == [round((1 - policy.sparsity_after(number)) * 52) for number in range(7)]
    assert [policy.changes_masks(number) for number in range(7)] == [False, True, True, True, True, False, False]


def test_with_nothing_to_cut_nothing_is_rewound(world):
    policy = Iterative(sparsity=0.0, finish=3)
    assert not any(policy.changes_masks(number) for number in range(5))
    dense = world.run([FedAvg()], 3)
    assert all(equal(a.params, b.params) for a, b in zip(run(world, policy, 3), dense, strict=True))


def test_the_memory_of_the_server_is_what_it_goes_back_to(world):
    layout = Layout(("w",), ((4,),))
    server = Server(params=Tree(layout, torch.tensor([1.0, 2.0, 3.0, 4.0])), buffers=world.server.buffers)
    trained = replace(server, params=Tree(layout, torch.tensor([9.0, 8.0, 0.1, 0.2])))
    policy = Iterative(sparsity=0.5, start=1, finish=1)
    ctx = replace(world.ctx(1), prunable=("w",))
    _, memory = policy.init_server(server, replace(world.ctx(0), prunable=("w",)))
    after, _, again = policy.settle(trained, Sums(), memory, ctx)
    assert after.params.flat.tolist() == [1.0, 2.0, 0.0, 0.0]
    assert again is memory


def test_the_file_is_complete_and_accepted_from_ten_rounds_on():
    policy = check_file("iterative", changed=("start", "finish", "every"))
    assert (policy.start, policy.finish, policy.every) == (1, 8, 1)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("sparsity", 1.0, "it is 0 to below 1; 0.9 keeps 1 in 10"),
        ("start", 0, "it is a round, at least 1: there is nothing to rewind before"),
        ("finish", 0, "it is the round of the last pruning, at least start (1)"),
        ("every", 0, "it is a number of rounds, at least 1"),
        ("rewind_to", 1, "it is 0 or a round before start (1), or null for no rewinding"),
        ("rewind_to", -1, "it is 0 or a round before start (1), or null for no rewinding"),
        ("ranking", "layer", "choose local or global"),
        ("budget", "all", "choose prunable_weights or all_parameters"),
        ("rounding", "up", "choose nearest or floor"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(field, value, rule):
    with pytest.raises(FieldError) as caught:
        Iterative(**{"sparsity": 0.5, field: value})
    assert str(caught.value) == f"{field} is {value!r}; {rule}"


def test_a_sparsity_that_the_run_never_reaches_is_refused():
    with pytest.raises(ConfigError) as caught:
        facts(Iterative(sparsity=0.9, finish=11), rounds=10)
    assert str(caught.value) == (
        "pruner.finish is 11; it must be at most rounds (10), or the sparsity of 0.9 is never reached; lower it or "
        "raise rounds"
    )


def test_a_ticket_that_no_round_is_left_to_train_is_warned_of():
    policy = Iterative(sparsity=0.9, finish=10)
    assert policy.warns(facts(policy, rounds=11)) == ()
    assert policy.warns(facts(policy, rounds=10)) == (
        "finish is 10, the last round: the run ends with the weights of round 0 under the final mask, untrained; lower "
        "it to train the ticket, or set rewind_to=null",
    )
    for other in (replace(policy, rewind_to=None), replace(policy, sparsity=0.0)):
        assert other.warns(facts(other, rounds=10)) == ()
