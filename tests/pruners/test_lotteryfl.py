from dataclasses import replace

import pytest
import torch
from personal_worlds import Personal

from fedray.corrections import FedProx, Scaffold
from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import SmallCNN
from fedray.models.task import Scope, layouts, prunable_names
from fedray.personal import Ditto, FedPer
from fedray.pruners import LotteryFL
from fedray.round import FieldError, Message, Part, View
from fedray.strategies import FedAvg, FedDyn, FedNova, FedSGD
from fedray.sums import Sums
from fedray.tree import Mask, Tree, equal, restrict
from fedray.wire import Codec, Wire

LOTTERY = LotteryFL(sparsity=0.9)
UNIFORM = FedAvg(weight_by="uniform")


def test_two_events_leave_64_percent_of_each_layer_and_the_first_weights_come_back_bit_for_bit(world):
    run = Personal(world, [LOTTERY, UNIFORM])
    for event, counts in enumerate(({"fc.weight": 32, "out.weight": 10}, {"fc.weight": 26, "out.weight": 8}), 1):
        _, job, fit, up = run.round()[1]
        assert run.kept(job.mask) == counts
        assert equal(job.params, restrict(world.server.params, job.mask))
        assert fit.mask == up.mask == up.parts["delta"].support == job.mask
        assert bool(job.mask["fc.bias"].all())
        assert abs(counts["fc.weight"] - 0.8**event * 40) <= 1
        assert abs(counts["out.weight"] - 0.8**event * 12) <= 1


def test_an_event_keeps_the_largest_of_what_was_received_under_the_mask_of_before(world):
    run = Personal(world, [LOTTERY, UNIFORM])
    run.round()
    server = run.server
    down, job, *_ = run.round()[2]
    assert equal(down["params"], restrict(server.params, down.mask))
    for name in world.prunable:
        size, before = server.params[name].abs(), down.mask[name]
        assert size[job.mask[name]].min() > size[before & ~job.mask[name]].max()
        assert not (job.mask[name] & ~before).any()


def test_the_gate_opens_above_the_accuracy_of_what_was_received_and_otherwise_training_goes_on(world):
    run = Personal(world, [LOTTERY, UNIFORM], accuracy=0.5)
    for turns in (run.round(), run.round()):
        for down, job, fit, up in turns.values():
            assert down.mask is job.mask is fit.mask is up.mask is None
            assert equal(job.params, down["params"])
    assert [client for client, _ in run.judged] == [0, 1, 2] * 2
    run.accuracy = 0.51
    server = run.server
    _, job, *_ = run.round()[0]
    assert run.kept(job.mask) == {"fc.weight": 32, "out.weight": 10}
    client, view = run.judged[6]
    assert client == 0
    assert equal(view.params, server.params)
    assert view.mask == Mask.full(world.layout)


def test_events_end_at_the_target_exactly_and_nothing_is_rewound_after(world):
    run = Personal(world, [replace(LOTTERY, sparsity=0.55), UNIFORM])
    counts = [run.kept(run.round((1,))[1][1].mask) for _ in range(7)]
    assert counts == [
        {"fc.weight": 32, "out.weight": 10},
        {"fc.weight": 26, "out.weight": 8},
        {"fc.weight": 21, "out.weight": 6},
        *[{"fc.weight": 18, "out.weight": 5}] * 4,  # 45 % of 52 are 23.4
    ]
    judged = len(run.judged)
    down, job, *_ = run.round((1,))[1]
    assert len(run.judged) == judged == 4
    assert equal(job.params, down["params"])


def test_masks_move_only_with_their_client_and_rest_while_it_is_away(world):
    run = Personal(world, [LOTTERY, UNIFORM])
    run.round((0, 1))
    before = dict(run.known)
    run.round((0,))
    assert run.known[0] != before[0]
    assert run.known[1] == before[1]
    assert 2 not in run.known
    assert run.round((1,))[1][0].mask == before[1]


def test_the_server_averages_weights_over_holders_and_keeps_what_nobody_holds(world):
    run = Personal(world, [LOTTERY, UNIFORM])
    run.round((0,))
    run.round((1, 0))
    for _ in range(2):
        before = run.server.params
        turns = run.round()
        holders = torch.stack([fit.mask.flat for _, _, fit, _ in turns.values()]).int().sum(0)
        total = torch.stack([fit.params.flat for _, _, fit, _ in turns.values()]).sum(0)
        expected = torch.where(holders > 0, total / holders, before.flat)
        assert run.server.mask is None
        assert torch.allclose(run.server.params.flat, expected, atol=1e-6)
        kept = holders == 0
        assert torch.equal(run.server.params.flat[kept], before.flat[kept])
    assert {0, 1, 2, 3} == set(holders.tolist())


def test_a_client_runs_the_servers_weights_under_its_mask_or_what_it_trained(world):
    whole = View(params=world.server.params, buffers=world.server.buffers, mask=None)
    averaged = replace(LOTTERY, runs="averaged")
    run = Personal(world, [averaged, UNIFORM])
    fit = run.round()[1][2]
    view = averaged.view(whole, run.memories[1][0], run.ctx(1))
    assert view.mask == fit.mask
    assert equal(view.params, restrict(world.server.params, fit.mask))
    assert averaged.view(whole, None, run.ctx(1)) is whole
    trained = replace(LOTTERY, runs="trained")
    run = Personal(world, [trained, UNIFORM])
    fit = run.round()[1][2]
    view = trained.view(whole, run.memories[1][0], run.ctx(1))
    assert equal(view.params, fit.params)
    assert equal(view.buffers, fit.buffers)
    assert view.mask == fit.mask
    assert trained.view(whole, None, run.ctx(1)) is whole


def test_a_pull_leads_to_what_was_received_also_after_a_rewind(world):
    run = Personal(world, [LOTTERY, UNIFORM, FedProx(mu=0.3)])
    run.round()
    down, job, *_ = run.round()[0]
    assert not equal(job.params, restrict(down["params"], job.mask))
    assert equal(job.anchor, restrict(down["params"], job.mask))


def test_a_client_without_steps_keeps_its_mask(world):
    run = Personal(replace(world, num_steps=0), [LOTTERY, UNIFORM])
    assert run.round()[0][1].mask is None
    assert run.judged == []


def test_the_published_bytes_are_the_values_of_the_weights_one_way():
    module = SmallCNN(shape=(1, 28, 28), num_classes=10)
    layout, buffers = layouts(module)
    weights = [name for name in layout.names if len(layout.shape(name)) > 1]
    count = sum(layout.sizes[layout.names.index(name)] for name in weights)
    assert count == 250 + 5000 + 16000 + 500 == 21_750
    assert count * 4 * 5 * 400 == 174_000_000
    assert round(174_000_000 / 2**20, 2) == 165.94
    codec = Codec(FedAvg().parts(layout, buffers), layout, tuple(weights), Wire())
    value = Tree(layout, torch.randn(layout.size, generator=Key.of(0).torch()))

    def sent(mask):
        part = Part(value=restrict(value, mask), support=mask)
        packet = codec.encode(Message(parts={"delta": part}, mask=mask), direction="up", known=mask, key=Key.of(0))
        assert sum(size.total_bytes for size in packet.sizes) == len(packet.payload)
        return len(packet.payload), next(size for size in packet.sizes if size.part == "delta")

    dense_bytes, dense = sent(None)
    assert dense.weights * 4 * 5 * 400 == 174_000_000
    assert dense.value_bytes == 4 * (21_750 + 90)  # and the biases, which the paper leaves out
    assert dense_bytes - dense.value_bytes < 64
    _, half = sent(Mask.of(layout, {name: torch.arange(value[name].numel()) % 2 == 0 for name in weights}))
    assert half.weights * 2 == dense.weights


def test_weights_and_no_biases_are_cut_of_the_published_model():
    module = SmallCNN(shape=(1, 28, 28), num_classes=10)
    names = prunable_names(module, Scope())
    assert [sum(layouts(module)[0].select(names).sizes), len(names)] == [21_750, 4]


def test_bad_company_is_refused_by_name(world):
    good = replace(world.facts(LOTTERY, UNIFORM), validation=0.2)
    LOTTERY.check(good)
    LOTTERY.check(replace(world.facts(Ditto(), LOTTERY, FedDyn(), FedProx(mu=1.0)), validation=0.2))
    cases = {
        "validation is 0; ": replace(good, validation=0.0),
        "pruner is lotteryfl; it asks for an accuracy, ": replace(good, objective="regression"),
        "pruner is lotteryfl; it needs a strategy ": replace(world.facts(LOTTERY, FedSGD()), validation=0.2),
        "scaffold is Scaffold; ": replace(world.facts(LOTTERY, UNIFORM, Scaffold()), validation=0.2),
        "fednova is FedNova; ": replace(world.facts(LOTTERY, FedNova()), validation=0.2),
        "fedper keeps tensors ": replace(world.facts(FedPer(), LOTTERY, UNIFORM), validation=0.2),
    }
    for start, facts in cases.items():
        with pytest.raises(ConfigError) as caught:
            LOTTERY.check(facts)
        assert str(caught.value).startswith(start)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("sparsity", 1.0), ("rate", 0.0), ("rate", 1.0), ("accuracy", 1.0), ("accuracy", -0.1), ("runs", "best")],
)
def test_a_bad_setting_is_refused(field, value):
    with pytest.raises(FieldError, match=f"^{field} is {value!r}; "):
        LotteryFL(**{field: value})


def test_it_promises_no_size_and_says_when_masks_may_change():
    assert LOTTERY.sparsity_after(3) is None
    assert [LOTTERY.changes_masks(number) for number in (0, 1, 9)] == [False, None, None]
    assert replace(LOTTERY, sparsity=0.0).changes_masks(4) is False


def test_the_order_of_clients_changes_no_bit(world):
    run = Personal(world, [LOTTERY, UNIFORM])
    run.round()
    ups = [up for *_, up in run.round().values()]
    found = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        sums = Sums()
        for at in order:
            sums.add(ups[at])
        found.append(UNIFORM.settle(run.server, sums, None, world.ctx(3))[0].params)
    assert all(equal(one, found[0]) for one in found)
