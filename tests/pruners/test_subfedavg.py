from dataclasses import replace

import pytest
import torch
from personal_worlds import Personal

from fedray.corrections import Scaffold
from fedray.errors import ConfigError
from fedray.personal import FedRep
from fedray.prune.merge import hamming
from fedray.prune.regrow import drop
from fedray.pruners import SubFedAvg
from fedray.round import FieldError
from fedray.strategies import FedAvg, FedNova, FedSGD
from fedray.tree import Mask, equal, restrict

HALF = SubFedAvg(sparsity=0.5, rate=0.25, distance=0.0)
UNIFORM = FedAvg(weight_by="uniform")


@pytest.fixture
def slow(world):
    """Clients of one batch an epoch, whose ranking by magnitude still moves from the first step to the last."""
    return replace(world, sizes=(2, 2, 2), num_steps=5, lr=0.2)


def test_a_client_takes_the_mask_after_its_last_epoch_and_keeps_what_it_trained(slow):
    run = Personal(slow, [HALF, UNIFORM])
    turns = run.round()
    for client, (down, job, fit, up) in turns.items():
        assert job.mask is None
        assert equal(job.params, down["params"])
        whole = slow.train(job, down, client).params
        expected = drop(whole, Mask.full(slow.layout), {"fc.weight": 30, "out.weight": 9}, names=slow.prunable)
        assert fit.mask == up.mask == expected
        assert equal(fit.params, restrict(whole, expected))
    assert len({fit.mask for _, _, fit, _ in turns.values()}) == 3


def test_the_first_candidate_is_that_of_one_epoch_from_what_was_received(slow):
    run = Personal(replace(slow, sizes=(3, 2, 7)), [HALF, UNIFORM])
    turns = run.round()
    assert [(client, job.num_steps) for client, job in run.more] == [(0, 2), (1, 1), (2, 4)]
    for client, job in run.more:
        assert equal(job.params, turns[client][1].params)
        assert job.wants == frozenset()


def test_the_distance_between_the_candidates_decides(slow):
    probe = Personal(slow, [HALF, UNIFORM])
    down, job, fit, _ = probe.round((1,))[1]
    first = slow.train(replace(job, num_steps=1), down, 1).params
    counts = {"fc.weight": 30, "out.weight": 9}
    early = drop(first, Mask.full(slow.layout), counts, names=slow.prunable)
    far = hamming(early, fit.mask, names=slow.prunable)
    assert 0.0 < far < 0.5
    for distance, moves in ((far * 0.99, True), (far, False)):
        run = Personal(slow, [replace(HALF, distance=distance), UNIFORM])
        assert (run.round((1,))[1][2].mask is not None) is moves
        assert bool(run.judged) is moves


def test_the_accuracy_of_the_trained_model_under_the_new_mask_decides(slow):
    run = Personal(slow, [HALF, UNIFORM], accuracy=0.5)
    fit = run.round((2,))[2][2]
    assert fit.mask is None
    view = run.judged[0][1]
    assert run.kept(view.mask) == {"fc.weight": 30, "out.weight": 9}
    assert equal(view.params, restrict(fit.params, view.mask))
    run.accuracy = 0.51
    assert run.kept(run.round((2,))[2][2].mask) == {"fc.weight": 30, "out.weight": 9}


def test_masks_shrink_to_the_target_exactly_and_rest_there_without_another_epoch(slow):
    policy = replace(HALF, distance=0.0)
    run = Personal(slow, [policy, UNIFORM])
    counts = []
    for _ in range(30):
        mask = run.round((0,))[0][2].mask
        counts.append(run.kept(mask) if mask is not None else None)
    steps = [one for at, one in enumerate(counts) if at == 0 or one != counts[at - 1]]
    assert [one for one in steps if one is not None] == [
        {"fc.weight": 30, "out.weight": 9},
        {"fc.weight": 22, "out.weight": 7},
        {"fc.weight": 20, "out.weight": 6},
    ]
    epochs, judged = len(run.more), len(run.judged)
    run.round((0,))
    assert (len(run.more), len(run.judged)) == (epochs, judged)


def test_each_mask_lies_within_the_one_before_and_is_what_is_sent_down(slow):
    run = Personal(slow, [HALF, UNIFORM])
    before = run.round()
    for client, (down, _, fit, _) in run.round().items():
        assert down.mask == before[client][2].mask
        assert not down["params"].flat[~down.mask.flat].any()
        assert not (fit.mask.flat & ~down.mask.flat).any()


def test_biases_are_averaged_over_all(slow):
    run = Personal(slow, [HALF, UNIFORM])
    biases = torch.stack([fit.params["fc.bias"] for _, _, fit, _ in run.round().values()])
    assert torch.allclose(run.server.params["fc.bias"], biases.mean(0), atol=1e-6)


def test_sparsity_zero_trains_and_sends_what_fedavg_does(slow):
    run, plain = Personal(slow, [replace(HALF, sparsity=0.0), UNIFORM]), Personal(slow, [UNIFORM])
    for _ in range(3):
        run.round()
        plain.round()
        assert equal(run.server.params, plain.server.params)
    assert run.more == run.judged == []


def test_bad_company_is_refused_by_name(world):
    good = replace(world.facts(HALF, UNIFORM, Scaffold(), epochs=5.0), validation=0.2)
    HALF.check(good)
    HALF.check(replace(world.facts(HALF, FedNova(), epochs=2.0), validation=0.2))
    cases = {
        "validation is 0; ": replace(good, validation=0.0),
        "trainer.epochs is 1; ": replace(good, epochs=1.0),
        "trainer.steps is 40; ": replace(good, epochs=None, steps=40),
        "pruner is subfedavg; it needs a strategy ": replace(world.facts(HALF, FedSGD(), epochs=5.0), validation=0.2),
        "fedrep keeps tensors ": replace(world.facts(FedRep(), HALF, UNIFORM, epochs=5.0), validation=0.2),
    }
    for start, facts in cases.items():
        with pytest.raises(ConfigError) as caught:
            HALF.check(facts)
        assert str(caught.value).startswith(start)


@pytest.mark.parametrize(
    ("field", "value"), [("sparsity", -0.1), ("rate", 1.0), ("distance", -1e-9), ("distance", 1.0), ("accuracy", 1.0)]
)
def test_a_bad_setting_is_refused(field, value):
    with pytest.raises(FieldError, match=f"^{field} is {value!r}; "):
        SubFedAvg(**{field: value})


def test_it_promises_no_size_and_says_when_masks_may_change():
    assert HALF.sparsity_after(3) is None
    assert [HALF.changes_masks(number) for number in (0, 1, 9)] == [False, None, None]
    assert replace(HALF, sparsity=0.0).changes_masks(4) is False
