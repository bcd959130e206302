"""Targets are reported once, at the first round that reaches them; patience counts evaluations without a new best."""

import json
from dataclasses import replace

import pytest
from laws_support import population, run, spec

from fedray.errors import RunError
from fedray.pruners import NoPruning
from fedray.round import Policy
from fedray.sim.checkpoint import State, load, save
from fedray.sim.client import Worker
from fedray.sim.driver import Driver
from fedray.sim.goals import Goals, Progress
from fedray.sim.runtime import InlineRuntime
from fedray.sim.spec import EvalSpec
from fedray.strategies import FedAvg


def rows(*values, metric="test/accuracy"):
    return [
        {"round": at, "wire/total_bytes": 10 * at, "time/total_s": 0.5 * at, **({} if v is None else {metric: v})}
        for at, v in enumerate(values, start=1)
    ]


def after(goals, *values, metric="test/accuracy"):
    progress = Progress(goals)
    for row in rows(*values, metric=metric):
        progress.enter(row)
    return progress


def test_a_target_counts_from_the_first_round_that_reaches_it():
    found = after(Goals(targets=(0.5, 0.9)), 0.3, 0.6, 0.4, 0.7).metrics()
    assert found == {"target/0.5/rounds": 2, "target/0.5/bytes": 20, "target/0.5/seconds": 1.0}
    falling = after(Goals(metric="test/loss", targets=(0.5,)), 0.9, 0.5, metric="test/loss").metrics()
    assert falling["target/0.5/rounds"] == 2


def test_a_run_ends_when_all_targets_are_reached():
    goals = Goals(targets=(0.5, 0.7), at_targets=True)
    assert after(goals, 0.6).why_stop is None
    assert "0.5, 0.7" in after(goals, 0.6, 0.7).why_stop
    assert after(replace(goals, at_targets=False), 0.6, 0.7).why_stop is None


def test_patience_counts_evaluations_without_a_new_best_by_more_than_min_delta():
    goals = Goals(patience=2)
    assert after(goals, 0.5, 0.4).why_stop is None
    assert after(goals, 0.5, 0.4, 0.5).why_stop is not None
    assert after(goals, 0.5, 0.4, 0.6, 0.5).why_stop is None
    assert after(replace(goals, min_delta=0.2), 0.5, 0.6, 0.7).why_stop is not None
    assert after(goals, 0.5, None, None, 0.4).why_stop is None  # rounds that were not evaluated do not count
    assert after(goals, 0.5, float("nan"), float("nan")).why_stop is not None
    falling = Goals(metric="test/perplexity", patience=2)
    assert after(falling, 9.0, 8.0, 7.0, metric=falling.metric).why_stop is None
    assert after(falling, 7.0, 8.0, 9.0, metric=falling.metric).why_stop is not None


def test_progress_survives_a_checkpoint():
    goals = Goals(targets=(0.5,), patience=3)
    progress = after(goals, 0.6, 0.2, 0.1)
    again = Progress.of_plain(goals, json.loads(json.dumps(progress.plain())))
    assert again == progress


EACH = EvalSpec(every=1, clients="cohort", batch_size=20)
GIVEN = spec(NoPruning(), FedAvg(), rounds=12, evaluation=EACH)


def test_a_run_that_stops_has_the_bits_of_one_that_does_not_up_to_there():
    whole = run(GIVEN, population())
    scores = [row["test/accuracy"] for row in whole.rows]
    target = sorted(set(scores))[len(set(scores)) // 2]
    first = next(at for at, score in enumerate(scores, start=1) if score >= target)
    stopped = run(replace(GIVEN, goals=Goals(targets=(target,), at_targets=True)), population())
    assert stopped.digests == whole.digests[:first]
    assert stopped.driver.stopped is not None
    assert stopped.rows[-1][f"target/{target:g}/rounds"] == first
    assert stopped.rows[-1][f"target/{target:g}/bytes"] == stopped.rows[-1]["wire/total_bytes"]
    assert whole.driver.stopped is None


def test_patience_ends_a_run_that_stands_still():
    still = run(
        replace(spec(NoPruning(), FedAvg(), rounds=12, lr=1e-12, evaluation=EACH), goals=Goals(patience=3)),
        population(),
    )
    assert len(still.rows) == 4  # the first is the best; three bring nothing new


def test_patience_goes_on_counting_after_a_resume(tmp_path):
    given = replace(
        spec(NoPruning(), FedAvg(), rounds=12, lr=1e-12, evaluation=EACH), goals=Goals(patience=5), checkpoint_every=1
    )
    straight = run(given, population())
    cut = run(replace(given, rounds=3), population())
    path = save(tmp_path, cut.records[-1].state())
    state = load(path)
    assert isinstance(state, State)
    worker = Worker(given, population())
    driver = Driver(given, population(), InlineRuntime(given, population()), worker, state)
    rest = [record.row["digest"] for record in driver.rounds()]
    assert cut.digests + rest == straight.digests
    assert len(straight.digests) == 6


@pytest.mark.parametrize("metric", ["test/loss", "test/mse", "client/mse_mean", "test/perplexity"])
def test_losses_errors_and_perplexities_get_better_as_they_fall(metric):
    assert not Goals(metric=metric).rising
    assert Goals(metric="test/accuracy").rising
    assert Goals(metric="client/accuracy_p10").rising


def test_an_evaluation_that_is_there_only_because_the_run_ends_does_not_count_in_a_longer_one(tmp_path):
    facts = {"rounds": 14, "lr": 1e-12, "evaluation": replace(EACH, every=2)}
    given = replace(spec(NoPruning(), FedAvg(), **facts), goals=Goals(patience=3), checkpoint_every=1)
    straight = run(given, population())
    cut = run(replace(given, rounds=3), population())
    assert "test/accuracy" in cut.rows[-1]
    state = load(save(tmp_path, cut.records[-1].state()))
    driver = Driver(given, population(), InlineRuntime(given, population()), Worker(given, population()), state)
    assert cut.digests + [record.row["digest"] for record in driver.rounds()] == straight.digests


def test_a_target_named_twice_is_reached_once():
    assert after(Goals(targets=(0.5, 0.5), at_targets=True), 0.6).why_stop is not None


class Failing(Policy):
    """Cannot settle round 3."""

    def settle(self, server, sums, memory, ctx):
        if ctx.round == 3:
            raise ValueError("as a test")
        return server, sums, memory


def test_a_round_that_is_finished_is_not_lost_when_the_next_cannot_be_settled():
    given = replace(GIVEN, policies=(*GIVEN.policies, ("failing", Failing())))
    driver = Driver(given, population(), InlineRuntime(given, population()), Worker(given, population()))
    rows, rounds = [], driver.rounds()
    rows.append(next(rounds).row)
    rows.append(next(rounds).row)
    with pytest.raises(RunError, match="as a test"):
        next(rounds)
    assert [row["round"] for row in rows] == [1, 2]
    assert all("test/accuracy" in row for row in rows)
