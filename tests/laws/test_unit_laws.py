"""What holds of whole runs that cut units: bytes and work fall with them, and they compose with lossy wires."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from laws_support import MOMENTUM, SIZES, WIRES, Packed, distance, label, population, run, spec, way

from fedray.corrections import FedProx
from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import Scope
from fedray.personal import LocalFineTuning, StaticNorm
from fedray.pruners import FedRolex, FjORD, HeteroFL, Hybrid, NoPruning, Structured
from fedray.sim.spec import EvalSpec
from fedray.strategies import FedAdam, FedAvg
from fedray.wire import TopK, Wire

BY_SERVER = (
    Structured(sparsity=0.5),
    Structured(sparsity=0.6, schedule="cubic", start=1, finish=4, ranking="global", score="group", most=0.7),
    Hybrid(sparsity=0.8, schedule="linear", start=0, finish=3),
)
BY_CAPACITY = (
    HeteroFL(rates=(1.0, 0.5, 0.25), shares=(1, 1, 1)),
    HeteroFL(rates=(1.0, 0.5), shares=(1, 1), assignment="dynamic", own_labels=False),
    FjORD(rates=(1.0, 0.5, 0.25), shares=(1, 1, 1)),
    FedRolex(rates=(0.5, 0.25), shares=(1, 1)),
)
PRUNERS = (*BY_SERVER, *BY_CAPACITY)
SPARSE = way(TopK(fraction=0.3), feedback=True)
LOSSY = {"int8": WIRES["int8"], "top-k with feedback": Wire(up=SPARSE)}


def ran(*policies, model="batchnorm_cnn", runtime=None, **changes):
    given = spec(*policies, model=model, **{"optim": MOMENTUM} | changes)
    hosts = population(model)
    return run(given, hosts, runtime and runtime(given, hosts))


@cache
def plain_run(pruner):
    return ran(pruner, FedAvg())


@cache
def dense_run():
    return ran(NoPruning(), FedAvg())


@pytest.mark.parametrize("pruner", PRUNERS, ids=label)
def test_fewer_bytes_and_less_work_than_dense_where_clients_are_sent_less(pruner):
    found, dense = plain_run(pruner), dense_run()
    for key in ("wire/up_bytes", "wire/down_bytes"):
        assert sum(row[key] for row in found.rows) < 0.8 * sum(row[key] for row in dense.rows)
    assert found.rows[-1]["model/train_flops"] < 0.8 * dense.rows[-1]["model/train_flops"]


def test_half_the_channels_have_the_parameters_and_flops_of_the_formula():
    # 4x4 pixels of 2 channels, 4 and 8 filters, 3 outputs after two poolings; norms have two numbers a channel.
    row = plain_run(BY_SERVER[0]).rows[-1]
    server = plain_run(BY_SERVER[0]).servers[-1]
    assert list(server.mask.counts().values()) == [2 * 2 * 9, 2, 2, 4 * 2 * 9, 4, 4, 3 * 4, 3]
    per_position = 2 * (2 * 2 * 9 * 16 + 4 * 2 * 9 * 4 + 3 * 4)
    assert row["model/flops"] == pytest.approx(per_position, rel=1e-6)


@pytest.mark.parametrize("pruner", BY_CAPACITY, ids=label)
def test_what_clients_trained_and_sent_is_what_their_width_holds(pruner):
    found = plain_run(pruner)
    kept = set()
    for uploads in found.uploads:
        for message, sent in uploads:
            held = message.mask
            if sent is not None:
                assert held is not None
                assert not (held.flat & ~sent.flat).any()
            if held is not None:
                assert not message["delta"].flat[~held.flat].any()
                assert message.parts["delta"].support == held
            kept.add(None if sent is None else sum(sent.counts().values()))
    assert len(kept) > 1
    assert all(server.mask is None for server in found.servers)


@pytest.mark.parametrize("wire", LOSSY)
@pytest.mark.parametrize("pruner", PRUNERS, ids=label)
def test_each_composes_with_a_lossy_wire(pruner, wire):
    found = ran(pruner, FedAvg(), wire=LOSSY[wire])
    plain = plain_run(pruner)
    assert sum(row["wire/up_bytes"] for row in found.rows) < sum(row["wire/up_bytes"] for row in plain.rows)
    for server in found.servers:
        assert server.mask is None or not server.params.flat[~server.mask.flat].any()
    for uploads in found.uploads:
        for message, _ in uploads:
            assert message.mask is None or not message["delta"].flat[~message.mask.flat].any()
    # Where the server ranks what was rounded in training, other units may go.
    if wire == "int8" and pruner not in BY_SERVER[1:]:
        assert distance(found.servers[-1].params, plain.servers[-1].params) < 0.1
    assert found.digests == ran(pruner, FedAvg(), wire=LOSSY[wire]).digests


@pytest.mark.parametrize("pruner", PRUNERS, ids=label)
def test_the_same_bits_however_clients_are_packed(pruner):
    deals = [{"chunk": 1}, {"chunk": 3, "workers": 2, "shuffle": Key.of(5)}]
    for deal in deals:
        packed = ran(pruner, FedAvg(), runtime=lambda given, hosts, deal=deal: Packed(given, hosts, **deal))
        assert packed.digests == plain_run(pruner).digests


@pytest.mark.parametrize("pruner", [BY_SERVER[0], BY_CAPACITY[0], BY_CAPACITY[3]], ids=label)
@pytest.mark.parametrize(
    "others",
    [(FedAvg(), FedProx(mu=0.1)), (FedAdam(lr=0.01),), (FedAvg(weight_by="uniform", average="all"),)],
    ids=["fedprox", "fedadam", "average over all"],
)
def test_each_goes_with_other_strategies_and_corrections(pruner, others):
    assert len(ran(pruner, *others).rows) == 4


@pytest.mark.parametrize("personal", [StaticNorm(), LocalFineTuning(epochs=1.0)], ids=label)
@pytest.mark.parametrize("pruner", [BY_SERVER[0], BY_CAPACITY[0], BY_CAPACITY[2]], ids=label)
def test_clients_are_evaluated_at_their_own_width_whatever_is_around_it(pruner, personal):
    found = ran(personal, pruner, FedAvg(), evaluation=EvalSpec(every=2, clients="all", batch_size=16))
    row = found.rows[-1]
    assert 0.0 <= row["client/accuracy_mean"] <= 1.0
    if pruner in BY_CAPACITY:
        assert 0.0 <= row["client/global_accuracy_mean"] <= 1.0


WHOLE = {"rates": (1.0,), "shares": (1,)}
NOTHING_CUT = (
    HeteroFL(**WHOLE, masked_loss=False, own_labels=False),
    FedRolex(**WHOLE),
    FjORD(**WHOLE),
    Structured(sparsity=0.0),
    Hybrid(sparsity=0.0),
)


@pytest.mark.parametrize("pruner", NOTHING_CUT, ids=label)
def test_nothing_cut_is_fedavg_bit_for_bit(pruner):
    found = ran(pruner, FedAvg())
    assert [s.params.flat.tolist() for s in found.servers] == [s.params.flat.tolist() for s in dense_run().servers]


def test_the_sizes_of_the_federation_are_those_that_widths_are_dealt_to():
    policy = HeteroFL(rates=(1.0, 0.5), shares=(1, 2), masked_loss=False, own_labels=False)
    found = ran(policy, FedAvg(), cohort=len(SIZES), rounds=1)
    sent = [mask is None for _, mask in found.uploads[0]]
    assert sorted(sent) == [False] * 4 + [True] * 2


def scoped(pruner, **scope):
    given = spec(pruner, FedAvg(), model="batchnorm_cnn", optim=MOMENTUM)
    hosts = population("batchnorm_cnn")
    return run(replace(given, task=replace(given.task, scope=Scope(**scope))), hosts)


@pytest.mark.parametrize("pruner", [*BY_SERVER, BY_CAPACITY[0], BY_CAPACITY[3]], ids=label)
def test_units_of_a_layer_that_is_out_of_scope_stay_and_others_go(pruner):
    found = scoped(pruner, first_layer=False)
    masks = [server.mask for server in found.servers] + [sent for uploads in found.uploads for _, sent in uploads]
    cut = [mask for mask in masks if mask is not None]
    assert len(cut) > 2
    for mask in cut:
        assert bool(mask["conv1.weight"].all())
        assert bool(mask["norm1.weight"].all())
        assert bool(mask["conv2.weight"].flatten(2).any(2).any(0).all())
    assert not all(bool(mask["conv2.weight"].flatten(1).any(1).all()) for mask in cut)
    why = "conv1: its weights are outside of scope.first_layer and scope.last_layer"
    assert why in found.driver.worker.structure.left_out
    # Outputs are never units, so the last layer's scope is nothing to them.
    last = scoped(pruner, last_layer=False)
    assert last.driver.worker.structure.left_out == ()


def test_a_scope_that_leaves_no_units_is_refused():
    given = spec(BY_SERVER[0], FedAvg(), model="mlp")
    given = replace(given, task=replace(given.task, scope=Scope(first_layer=False)))
    with pytest.raises(ConfigError, match=r"^no units are left that can be cut whole \(layers.1: its weights are out"):
        run(given, population("mlp"))


WEIGHTS = {"conv2.weight": (8, 4, 3, 3), "fc.weight": (3, 8)}


@pytest.mark.parametrize("pruner", BY_CAPACITY, ids=label)
def test_a_run_from_a_pruned_one_stays_under_its_mask_at_every_width(pruner):
    given, hosts = spec(pruner, FedAvg(), model="batchnorm_cnn", optim=MOMENTUM), population("batchnorm_cnn")
    kept = {name: torch.arange(math.prod(shape)).view(shape) % 3 > 0 for name, shape in WEIGHTS.items()}
    found = run(replace(given, initial_mask=kept), hosts)
    held = found.servers[0].mask
    assert 0 < held.sparsity() < 0.5
    for server in found.servers:
        assert server.mask == held
        assert not server.params.flat[~held.flat].any()
    for uploads in found.uploads:
        for message, sent in uploads:
            assert not (sent.flat & ~held.flat).any()
            assert not message["delta"].flat[~held.flat].any()
    assert not torch.equal(found.servers[0].params.flat, found.servers[-1].params.flat)
