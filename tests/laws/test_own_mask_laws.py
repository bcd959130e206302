"""What holds of whole runs whose clients have masks of their own: alone, composed, packed and in any order."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from laws_support import (
    MOMENTUM,
    SIZES,
    WIRES,
    Packed,
    label,
    population,
    run,
    spec,
    way,
)

import fedray
from fedray.corrections import FedProx
from fedray.keys import Key
from fedray.personal import Ditto, LocalFineTuning
from fedray.pruners import LocalMagnitude, LotteryFL, NoPruning, SubFedAvg, SubFedAvgHybrid
from fedray.round import ConfigError
from fedray.sim.spec import EvalSpec
from fedray.strategies import FedAvg, FedAvgM
from fedray.wire import TopK, Wire

HELD = 2
UNIFORM = FedAvg(weight_by="uniform")
# Gates that open soon, for clients with a handful of samples.
LOTTERY = LotteryFL(sparsity=0.8, accuracy=0.0)
UN = SubFedAvg(sparsity=0.5, rate=0.2, distance=0.0, accuracy=0.0)
HY = SubFedAvgHybrid(channel_rate=0.3, rate=0.2, distance=0.0, channel_distance=0.0, accuracy=0.0, shrink=False)
OWN = LocalMagnitude(sparsity=0.8, schedule="cubic", start=1, finish=4, masks="personal")
TOGETHER = LocalMagnitude(sparsity=0.8, schedule="cubic", start=1, finish=4, merge="vote")
PERSONAL = (LOTTERY, replace(LOTTERY, runs="averaged"), UN, HY, OWN)
PRUNERS = (*PERSONAL, TOGETHER)


def people(model="mlp"):
    """Clients who validate on two rows of their own."""
    given = population(model)
    rows = np.concatenate([given.rows[start : start + HELD] for start in (*given.starts[:-2], given.starts[-2] - 1)])
    return replace(given, held_rows=rows, held_starts=np.arange(len(SIZES) + 1) * HELD)


def model_of(*policies):
    return "batchnorm_cnn" if any(isinstance(one, SubFedAvgHybrid) for one in policies) else "mlp"


def ran(*policies, runtime=None, model=None, **changes):
    model = model or model_of(*policies)
    facts = {"epochs": 2, "rounds": 4, "optim": MOMENTUM, "validation": 0.1}
    given, hosts = spec(*policies, model=model, **facts | changes), people(model)
    return run(given, hosts, runtime and runtime(given, hosts))


@cache
def plain_run(pruner, model=None):
    return ran(pruner, UNIFORM, model=model)


@pytest.mark.parametrize("pruner", PRUNERS, ids=label)
def test_uploads_are_zero_outside_their_masks_and_masks_only_shrink(pruner):
    found = plain_run(pruner)
    cut = 0
    for uploads in found.uploads:
        for message, sent in uploads:
            if message.mask is not None:
                cut += 1
                assert not message["delta"].flat[~message.mask.flat].any()
                assert message.parts["delta"].support == message.mask
            if sent is not None:
                assert not (message.mask.flat & ~sent.flat).any()
    assert cut > 4
    server = found.servers[-1]
    assert (server.mask is None) == (pruner in PERSONAL)


@pytest.mark.parametrize("pruner", PERSONAL, ids=label)
def test_a_client_is_sent_the_mask_that_it_sent_last(pruner):
    found = plain_run(pruner)
    last, known = {}, 0
    for record, uploads in zip(found.records, found.uploads, strict=True):
        cohort = [row["client"] for row in record.clients if "num_steps" in row]
        for client, (message, sent) in zip(cohort, uploads, strict=True):
            assert sent == last.get(client)
            known += sent is not None
            last[client] = message.mask
    assert known > 3
    assert len({mask.digest for mask in last.values() if mask is not None}) > 1


@pytest.mark.parametrize("pruner", PRUNERS, ids=label)
@pytest.mark.parametrize(("chunk", "workers"), [(1, 3), (4, 2)])
def test_the_same_bits_packed_anyhow_and_in_any_order(pruner, chunk, workers):
    alone = plain_run(pruner)

    def packed(given, given_people):
        return Packed(given, given_people, chunk=chunk, workers=workers, shuffle=Key.of(chunk))

    other = ran(pruner, UNIFORM, runtime=packed)
    assert other.digests == alone.digests
    assert other.bytes == alone.bytes


COMPANY = {
    "int8": {"wire": WIRES["int8"]},
    "topk with feedback": {"wire": Wire(up=way(TopK(fraction=0.3), feedback=True))},
    "feedback on both sides": {"wire": WIRES["int8 with feedback on both sides"]},
    "stc": {"wire": WIRES["stc"]},
}


@pytest.mark.parametrize("pruner", PRUNERS, ids=label)
@pytest.mark.parametrize("wire", ["int8", "topk with feedback"])
def test_a_lossy_wire_with_feedback_goes_with_masks_of_their_own(pruner, wire):
    plain, lossy = plain_run(pruner), ran(pruner, UNIFORM, **COMPANY[wire])
    assert sum(up for up, _ in lossy.bytes) < sum(up for up, _ in plain.bytes)
    for uploads in lossy.uploads:
        for message, _ in uploads:
            if message.mask is not None:
                assert not message["delta"].flat[~message.mask.flat].any()
    assert lossy.digests[0] != plain.digests[0]


@pytest.mark.parametrize("wire", ["feedback on both sides", "stc"])
def test_feedback_on_the_way_down_is_for_one_message_to_all(wire):
    for pruner in PERSONAL:
        with pytest.raises(ConfigError, match="sends each client a message of its own"):
            ran(pruner, UNIFORM, **COMPANY[wire])
    ran(TOGETHER, UNIFORM, **COMPANY[wire])


@pytest.mark.parametrize("pruner", PRUNERS, ids=label)
def test_a_pull_and_personal_models_go_with_masks_of_their_own(pruner):
    plain = plain_run(pruner)
    pulled = ran(pruner, UNIFORM, FedProx(mu=0.5))
    assert pulled.digests != plain.digests
    evaluated = EvalSpec(every=2, clients="all", batch_size=16)
    for personal in (Ditto(), LocalFineTuning()):
        # They look at the model and change nothing of the run.
        assert ran(personal, pruner, UNIFORM, evaluation=evaluated).digests == plain.digests
    assert ran(pruner, FedAvgM(lr=0.5), FedProx(mu=0.1)).digests != plain.digests


IDLE = [
    replace(LOTTERY, sparsity=0.0),
    replace(UN, sparsity=0.0),
    replace(UN, distance=0.99),
    replace(OWN, sparsity=0.0),
    replace(TOGETHER, sparsity=0.0),
    replace(HY, sparsity=0.0, channel_sparsity=0.0, penalty=0.0),
]


@pytest.mark.parametrize("pruner", IDLE, ids=label)
def test_where_nothing_is_cut_it_is_fedavg_bit_for_bit(pruner):
    plain, idle = plain_run(NoPruning(), model_of(pruner)), plain_run(pruner)
    assert idle.digests == plain.digests
    assert idle.bytes == plain.bytes


@pytest.mark.parametrize("pruner", [LOTTERY, UN, HY], ids=label)
def test_the_gate_is_asked_in_runs_too(pruner):
    shut = ran(replace(pruner, accuracy=0.999), UNIFORM)
    masks = [
        [message.mask for uploads in found.uploads for message, _ in uploads] for found in (plain_run(pruner), shut)
    ]
    opened, closed = (sum(mask is not None for mask in found) for found in masks)
    assert closed < opened


def test_the_extra_epoch_is_counted_until_the_target_is_reached():
    def seen(found):
        return [sum(row["train_flops"] for row in record.clients if "train_flops" in row) for record in found.records]

    plain, pruned = ran(NoPruning(), UNIFORM, rounds=8), ran(replace(UN, sparsity=0.2), UNIFORM, rounds=8)
    assert seen(pruned)[0] == 3 / 2 * seen(plain)[0]  # two epochs, and one more
    assert seen(pruned)[-1] <= seen(plain)[-1]


@pytest.mark.parametrize(
    "pruner",
    ["pruner=lotteryfl", "pruner=subfedavg", "pruner=local_magnitude pruner.masks=personal pruner.sparsity=0.5"],
)
def test_on_two_classes_what_a_client_runs_is_far_above_the_global_model(pruner, tmp_path):
    made = "data=digits partition=classes num_clients=10 cohort=5 rounds=8 validation=0.2 strategy.weight_by=uniform"
    trainer = "model.hidden=[32] trainer.lr=0.1 trainer.batch_size=10 trainer.epochs=4 checkpoint.every=0"
    quiet = "runtime=inline tracker.progress=none tracker.wandb.mode=disabled eval.clients=all eval.every=8"
    row = fedray.run([*made.split(), *trainer.split(), *pruner.split(), *quiet.split()], folder=tmp_path / "run").rows[
        -1
    ]
    assert row["client/accuracy_mean"] > row["client/global_accuracy_mean"] + 0.15
