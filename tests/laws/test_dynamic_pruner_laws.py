"""Whole runs of pruners with one global mask that moves: when it moves, what is sent for it, and that bits are the same
wherever clients live."""

import itertools
from dataclasses import replace

import pytest
import torch
from laws_support import MOMENTUM, Packed, label, population, run, spec

from fedray.pruners import SET, FedTiny, PruneFL, RigL
from fedray.strategies import FedAvg
from fedray.tree import equal

RIGL = RigL(sparsity=0.6, every=2, until=6, ratio=0.5)
TINY = FedTiny(sparsity=0.6, every=2, until=6, ratio=0.5, ratio_decay="constant", groups=1)
PRUNE = PruneFL(every=2, removal=0.4, initial_rounds=8, initial_every=2, initial_steps=2, patience=3, constant_s=1e-4)
SWAPPING = (RIGL, SET(sparsity=0.6, every=2, until=6), TINY)
ALL = (*SWAPPING, PRUNE)


def ran(policy, model="batchnorm_cnn", rounds=7, **facts):
    return run(spec(policy, FedAvg(), model=model, rounds=rounds, optim=MOMENTUM, **facts), population(model))


def parts(observed, exchange=None):
    """One row for each part that crossed, of the training or of an exchange."""
    rows = [row for record in observed.records for row in record.transfers]
    return [row for row in rows if row.get("exchange") == exchange]


@pytest.mark.parametrize("model", ["mlp", "batchnorm_cnn"])
@pytest.mark.parametrize("policy", SWAPPING, ids=label)
def test_masks_move_on_the_rounds_that_a_policy_names_and_rest_between_at_the_promised_size(policy, model):
    observed = ran(policy, model)
    names, servers = observed.driver.worker.prunable, observed.servers
    for number, (before, after) in enumerate(itertools.pairwise(servers), start=1):
        moved = before.mask != after.mask
        if not policy.changes_masks(number):
            assert not moved
        if policy.is_due(number):
            assert moved
    total = sum(servers[0].mask[name].numel() for name in names)
    for server in servers:
        assert sum(server.mask.counts(names).values()) == round((1 - policy.sparsity_after(3)) * total)
        assert not server.params.flat[~server.mask.flat].any()
        assert all(bool(server.mask[name].all()) for name in server.mask if name not in names)


def test_rigl_sends_a_gradient_that_is_dense_where_the_mask_cuts_for_no_byte_of_positions():
    observed = ran(RIGL, "mlp")
    for number, uploads in enumerate(observed.uploads, start=1):
        for message, _ in uploads:
            assert ("growth" in message) == RIGL.is_due(number)
            if RIGL.is_due(number):
                part = message.parts["growth"]
                assert part.support == ~message.mask
                # Units that are off for a whole batch leave zeros too.
                assert int((part.value.flat != 0).sum()) > 5
    sizes = [row for row in parts(observed) if row["part"] == "growth"]
    assert len(sizes) == 8
    assert all(row["mask_bytes"] == 0 and row["value_bytes"] == 4 * row["kept"] for row in sizes)


def test_fedtiny_sends_a_few_gradients_and_their_positions():
    observed = ran(TINY, "mlp")
    sizes = [row for row in parts(observed) if row["part"] == "growth"]
    assert len(sizes) == 8
    names = observed.driver.worker.prunable
    sent = {2: observed.servers[1].mask, 4: observed.servers[3].mask}
    for row in sizes:
        assert row["kept"] == sum(count // 2 for count in sent[row["round"]].counts(names).values())
        assert row["mask_bytes"] > 0


def test_fedtinys_questions_are_in_the_ledger_and_only_batch_normalisation_costs_statistics():
    observed = ran(TINY)
    moments, losses = parts(observed, "candidate_statistics"), parts(observed, "candidate_losses")
    assert {row["round"] for row in moments + losses} == {1}
    assert {row["client"] for row in moments} == {row["client"] for row in losses} == set(range(6))
    assert {row["part"] for row in moments if row["direction"] == "down"} == {"message"}
    assert {row["part"] for row in losses if row["direction"] == "up"} == {"message", "losses"}
    assert len([row for row in losses if row["part"] == "moments4" and row["direction"] == "down"]) == 6
    plain = ran(TINY, "mlp")
    assert not parts(plain, "candidate_statistics")
    assert len(parts(plain, "candidate_losses")) == 18


def test_fedtinys_choice_is_the_candidate_of_the_least_loss_on_all_training_data():
    policy, data = replace(TINY, noise=0.9), population("mlp")
    made = spec(policy, FedAvg(), model="mlp", rounds=1)
    observed, module = run(made, data), made.task.module(made.key.fold("model"))
    x, y = (torch.from_numpy(data.train_x) - 0.1) / 1.5, torch.from_numpy(data.train_y)
    losses = {}
    # Two of the five may divide the budget alike.
    for number in range(5):
        mask = policy.candidate(number, observed.driver._context(1, ()))
        weights = {name: tensor * mask[name] for name, tensor in module.named_parameters()}
        outputs = torch.func.functional_call(module, weights, (x,))
        losses[float(torch.nn.functional.cross_entropy(outputs, y).detach())] = mask
    assert len(losses) > 3
    assert observed.servers[1].mask == losses[min(losses)]


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_prunefl_finds_a_size_weights_return_and_importance_is_dense(engine):
    observed = ran(PRUNE, "mlp", engine=engine)
    servers, names = observed.servers, observed.driver.worker.prunable
    sizes = [sum(server.mask.counts(names).values()) for server in servers]
    assert sizes[0] == sum(servers[0].mask[name].numel() for name in names)
    assert sizes[1] < sizes[0]
    moved = [before.mask != after.mask for before, after in itertools.pairwise(servers)]
    assert moved == [True, True, False, True, False, True, False]
    assert any((after.mask.flat & ~before.mask.flat).any() for before, after in itertools.pairwise(servers))
    for number, uploads in enumerate(observed.uploads, start=1):
        for message, sent in uploads:
            assert ("importance" in message) == (number % 2 == 0)
            if number % 2 == 0:
                assert int((message["importance"].flat[~sent.flat] > 0).sum()) > 5
    here = parts(observed, "initial_pruning")
    assert [(row["direction"], row["part"]) for row in here] == [
        ("down", "message"),
        ("down", "flops"),
        ("up", "message"),
        ("up", "params"),
    ]
    assert {row["round"] for row in here} == {1}


def test_prunefls_initial_client_gives_its_weights_mask_and_statistics_to_all():
    made = spec(PRUNE, FedAvg(), model="batchnorm_cnn", rounds=1, cohort=1)
    observed = run(made, population("batchnorm_cnn"))
    (message, sent), *_ = observed.uploads[0]
    assert sent == message.mask
    assert sent != observed.servers[0].mask
    worker = observed.driver.worker
    assert not equal(observed.servers[0].buffers, observed.servers[1].buffers)
    assert sent.sparsity(worker.prunable) > 0.0


@pytest.mark.parametrize("policy", ALL, ids=label)
def test_bits_are_the_same_wherever_clients_live_and_in_whatever_order_they_answer(policy):
    made = spec(policy, FedAvg(), model="mlp", rounds=5)
    here = run(made, population("mlp"))
    key = made.key.fold("shuffle")
    packed = run(made, population("mlp"), Packed(made, population("mlp"), chunk=2, workers=3, shuffle=key))
    assert here.digests == packed.digests
    assert here.bytes == packed.bytes


@pytest.mark.parametrize(
    "policy",
    [
        RigL(sparsity=0.0, every=1, until=9),
        SET(sparsity=0.0, every=1, until=9),
        FedTiny(sparsity=0.0, every=1, until=9),
        PruneFL(every=9, initial_rounds=0),
    ],
    ids=label,
)
def test_a_mask_that_cuts_nothing_is_the_dense_run_bit_for_bit(policy):
    masked = ran(policy, rounds=4)
    dense = run(spec(model="batchnorm_cnn", optim=MOMENTUM), population("batchnorm_cnn"))
    for a, b in zip(dense.servers, masked.servers, strict=True):
        assert equal(a.params, b.params)
        assert equal(a.buffers, b.buffers)
