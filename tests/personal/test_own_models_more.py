"""A client's own model is trained by its own rules, whatever the method of the global one does to its job."""

from dataclasses import replace

import pytest
import torch
from laws_support import SIZES, distance, population, run, spec
from quadratics import LAYOUT, NOTHING, Federation, context, draw, some

from fedray.corrections import Scaffold
from fedray.personal import Ditto, LocalFineTuning
from fedray.pruners import NoPruning
from fedray.round import Message, View
from fedray.strategies import FedAvg, FedDyn, FedSGD
from fedray.tree import Tree, restrict

EVERYONE = len(SIZES)


def alone(*policies, **changes):
    """What clients have of their own after some rounds of Ditto without a pull, which is local training alone."""
    given = {"cohort": EVERYONE, "rounds": 3, **changes}
    ran = run(spec(Ditto(pull=0.0), NoPruning(), *policies, **given), population())
    own = [record.memories[0]["params"] for _, record in sorted(ran.driver.runtime.records.items())]
    assert len(own) == EVERYONE
    return own, ran


@pytest.mark.parametrize("policies", [(FedAvg(), Scaffold()), (FedDyn(alpha=0.5),), (FedDyn(alpha=0.5), Scaffold())])
def test_no_drift_of_the_global_job_reaches_an_own_model(policies):
    (plain, theirs), (mine, ran) = alone(FedAvg()), alone(*policies)
    assert ran.digests[1:] != theirs.digests[1:]  # the global model does feel it
    assert max(distance(a, b) for a, b in zip(mine, plain, strict=True)) < 1e-6


def test_an_own_model_learns_at_the_trainers_rate_also_where_the_global_job_stands_still():
    (mine, ran), (plain, _) = alone(FedSGD()), alone(FedAvg(), batch_size=99)
    start = ran.servers[0].params
    assert min(distance(tree, start) for tree in mine) > 1e-3
    assert max(distance(a, b) for a, b in zip(mine, plain, strict=True)) < 1e-5


@pytest.mark.parametrize("lr", [None, 0.3])
def test_fine_tuning_stays_under_the_mask_of_the_model_that_it_is_given(lr):
    mask, asked = some(3), []
    here = Federation((NoPruning(),))

    def train(job, name):
        asked.append(job)
        return here.train(job, Message(), 0)

    given = View(params=restrict(draw("origin"), mask), buffers=Tree.zeros(NOTHING), mask=mask)
    ctx = replace(context(client=0, lr=0.1), train=train)
    found = LocalFineTuning(epochs=2, lr=lr).view(given, None, ctx)
    (job,) = asked
    assert (job.num_steps, job.lr) == (2 * 5, lr or 0.1)  # ten examples in batches of two
    assert job.mask is not None
    assert torch.equal(job.mask.flat, mask.flat)
    assert torch.equal(found.mask.flat, mask.flat)
    # On a quadratic of bend 1 each step takes the share lr of the way to the target.
    way = 1 - (1 - (lr or 0.1)) ** 10
    expected = draw("origin").flat + way * (here.target(0).flat - draw("origin").flat)
    assert torch.allclose(found.params.flat, torch.where(mask.flat, expected, 0.0), atol=1e-5)
    assert found.params.layout == LAYOUT
