"""FedSAM, label smoothing and FedLC against training by hand, and all corrections together."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from laws_support import CLASSES, distance, population, run, spec
from quadratics import context, draw, facts

from fedray.corrections import FedLC, FedProx, FedSAM, LabelSmoothing, Scaffold
from fedray.errors import ConfigError
from fedray.models.task import Classification
from fedray.pruners import NoPruning, Random
from fedray.round import ABSENT_SHIFT, FieldError, Job, Loss, Message, Optim, Part
from fedray.sim.client import Worker
from fedray.strategies import FedAvg, FedSGD
from fedray.tree import Tree, equal

ALONE = (12,)
STEPS, LR = 4, 0.3


def alone(*corrections, model="mlp", engine="eager", pruner=None, optim=None):
    """A round of one client that takes a few full-batch steps."""
    options = {"model": model, "engine": engine, "num_clients": 1, "cohort": 1, "rounds": 1, "optim": optim}
    given = spec(pruner or NoPruning(), FedAvg(), *corrections, lr=LR, batch_size=99, epochs=STEPS, **options)
    return given, run(given, population(model, ALONE))


def by_hand(given, loss, *, rho=0.0, model="mlp", mask=None):
    """The same steps in plain PyTorch, float32: the weights (n,) at the end."""
    worker = Worker(given, population(model, ALONE))
    module, parameters = worker.engine.module.train(), list(worker.engine.module.parameters())
    x, y = worker.population.train(0).take(slice(None), torch.device("cpu"))
    kept = [torch.ones_like(p) for p in parameters]
    if mask is not None:
        kept = [mask[name].float() for name, _ in worker.engine.module.named_parameters()]
    with torch.no_grad():
        for parameter, m in zip(parameters, kept, strict=True):
            parameter.mul_(m)

    def gradient():
        return [g * m for g, m in zip(torch.autograd.grad(loss(module(x), y), parameters), kept, strict=True)]

    for _ in range(STEPS):
        gradients = gradient()
        here = [p.detach().clone() for p in parameters]
        if rho:
            length = torch.sqrt(sum(g.square().sum() for g in gradients))
            with torch.no_grad():
                for parameter, g in zip(parameters, gradients, strict=True):
                    parameter.add_(g * (rho / length))
            gradients = gradient()
        with torch.no_grad():
            for parameter, w, g in zip(parameters, here, gradients, strict=True):
                parameter.copy_(w - LR * g)
    return torch.cat([p.detach().flatten() for p in parameters])


COUNTS = population("mlp", ALONE).label_counts[0]


def calibrated(tau):
    def loss(logits, y):
        each = []
        for row, label in zip(logits, y, strict=True):
            shifted = [f - tau * float(n) ** -0.25 if n else None for f, n in zip(row, COUNTS, strict=True)]
            others = torch.stack([s for s in shifted if s is not None])
            each.append(torch.logsumexp(others, 0) - shifted[int(label)])
        return torch.stack(each).mean()

    return loss


def smooth(s):
    def loss(logits, y):
        target = (1 - s) * F.one_hot(y, CLASSES) + s / CLASSES
        return -(target * logits.log_softmax(1)).sum(1).mean()

    return loss


CASES = {
    "FedSAM": (FedSAM(rho=0.3), F.cross_entropy, 0.3),
    "LabelSmoothing": (LabelSmoothing(smoothing=0.3), smooth(0.3), 0.0),
    "FedLC": (FedLC(tau=2.0), calibrated(2.0), 0.0),
}


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("case", CASES)
def test_a_changed_local_loss_trains_as_by_hand(case, engine):
    correction, loss, rho = CASES[case]
    given, ran = alone(correction, engine=engine)
    assert distance(ran.servers[-1].params, by_hand(given, loss, rho=rho)) < 1e-5
    _, plain = alone(engine=engine)
    assert distance(ran.servers[-1].params, plain.servers[-1].params) > 1e-3


def test_on_a_sparse_model_the_climb_stays_on_the_mask():
    given, ran = alone(FedSAM(rho=0.5), pruner=Random(sparsity=0.6))
    mask = ran.servers[0].mask
    assert not ran.servers[-1].params.flat[~mask.flat].any()
    assert distance(ran.servers[-1].params, by_hand(given, F.cross_entropy, rho=0.5, mask=mask)) < 1e-5


def test_a_climb_takes_the_statistics_of_batches_where_the_model_is():
    # Both forward passes see the same batch; had both counted, the running statistics would have moved twice a step.
    _, plain = alone(model="batchnorm_cnn")
    _, climbed = alone(FedSAM(rho=1e-6), model="batchnorm_cnn")
    a, b = (r.servers[-1].buffers for r in (plain, climbed))
    assert distance(a, b) < 1e-3


def test_calibration_bounds_the_shift_of_classes_that_a_client_does_not_have():
    ctx = replace(context(), client=replace(context(client=0).client, label_counts=(16, 0, 1)))
    shift = FedLC(tau=0.5).begin(Message(), _job(), None, ctx)[1].loss.logit_shift
    assert shift == pytest.approx((0.25, 100.0, 0.5))
    logits = torch.zeros(1, 3, requires_grad=True)
    F.cross_entropy(logits - torch.tensor(shift), torch.tensor([0])).backward()
    assert abs(float(logits.grad[0, 1])) < 1e-20


def test_smoothing_leaves_out_the_classes_that_a_client_does_not_have():
    loss = Loss(smoothing=0.1, logit_shift=(0.5, ABSENT_SHIFT, 0.25, ABSENT_SHIFT))
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([0, 2, 2, 0, 2, 0])
    value = Classification().loss(logits, targets, loss)
    value.backward()
    grad, logits = logits.grad, logits.detach()
    there = logits[:, [0, 2]] - torch.tensor([0.5, 0.25])
    wanted = F.cross_entropy(there, targets // 2, label_smoothing=0.1)
    assert float(value.detach()) == pytest.approx(float(wanted), rel=1e-5)
    assert float(grad[:, [1, 3]].abs().max()) < 1e-20
    plain = Loss(smoothing=0.1, logit_shift=(0.5, 0.0, 0.25, 1.0))
    shifted = F.cross_entropy(logits - torch.tensor(plain.logit_shift), targets, label_smoothing=0.1)
    assert float(Classification().loss(logits, targets, plain)) == pytest.approx(float(shifted), rel=1e-5)


def _job(**changes):
    empty = Tree.zeros(type(draw("x").layout)((), ()))
    given = {"mask": None, "num_steps": 3, "batch_size": 2, "lr": 0.1, "optim": Optim(), "buffers": empty}
    return Job(params=draw("origin"), **given | changes)


def test_corrections_add_up_whatever_their_order_and_none_takes_anothers_place():
    ctx = replace(context(), client=replace(context(client=0).client, label_counts=(16, 81, 1)))
    message = Message().put("control", Part(value=draw("c")))
    there = _job(drift=draw("d"), prox=0.5, sharpness=0.1, loss=Loss(smoothing=0.5, logit_shift=(1.0, 0.0, 2.0)))
    onion = (FedProx(mu=0.25), Scaffold(), FedSAM(rho=0.2), FedLC(tau=3.0), LabelSmoothing(smoothing=0.1))
    for order in (onion, onion[::-1]):
        job = there
        for correction in order:
            memory = draw("own") if isinstance(correction, Scaffold) else None
            _, job, _ = correction.begin(message, job, memory, ctx)
        assert job.prox == 0.75
        assert job.sharpness == pytest.approx(0.3)
        assert torch.allclose(job.drift.flat, draw("d").flat + draw("c").flat - draw("own").flat)
        assert job.loss.logit_shift == pytest.approx((2.5, 1.0, 5.0))
        assert 1 - job.loss.smoothing == pytest.approx(0.5 * 0.9)
        unchanged = {"params", "buffers", "mask", "num_steps", "batch_size", "lr", "optim", "trains", "anchor", "local"}
        assert all(getattr(job, name) is getattr(there, name) for name in unchanged)


def test_each_of_them_changes_the_result_also_beside_the_others():
    full = (FedProx(mu=0.5), Scaffold(), FedSAM(rho=0.2), FedLC(tau=1.0), LabelSmoothing(smoothing=0.2))

    def digest(corrections):
        return run(spec(NoPruning(), FedAvg(), *corrections, rounds=2, cohort=6), population()).digests[-1]

    found = {digest(full)} | {digest(full[:at] + full[at + 1 :]) for at in range(5)}
    assert len(found) == 6


OFF = {
    "FedSAM": (FedSAM(rho=0.0), Optim()),
    "LabelSmoothing": (LabelSmoothing(smoothing=0.0), Optim()),
    "FedLC": (FedLC(tau=0.0), Optim(momentum=0.9)),
}


@pytest.mark.parametrize("case", OFF)
@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_switched_off_a_correction_is_the_strategy_alone_bit_for_bit(case, engine):
    correction, optim = OFF[case]
    given = [spec(NoPruning(), FedAvg(), *more, optim=optim, engine=engine, rounds=2) for more in ((), (correction,))]
    plain, off = (run(one, population()) for one in given)
    assert all(equal(a.params, b.params) for a, b in zip(plain.servers, off.servers, strict=True))


@pytest.mark.parametrize(
    ("policy", "run_facts", "sentence"),
    [
        (FedLC(), {"objective": "regression"}, "correction is fedlc and the data's objective is regression"),
        (FedLC(), {"objective": "next_token"}, "correction is fedlc and the data's objective is next_token"),
        (LabelSmoothing(), {"objective": "regression"}, "correction is label_smoothing and the data's objective is"),
    ],
    ids=str,
)
def test_corrections_of_the_cross_entropy_refuse_what_has_none(policy, run_facts, sentence):
    for fine in (None, "classification"):
        policy.check(facts(FedAvg(), policy, objective=fine))
    LabelSmoothing().check(facts(objective="next_token"))
    with pytest.raises(ConfigError) as caught:
        policy.check(facts(FedAvg(), policy, **run_facts))
    assert str(caught.value).startswith(sentence)


def test_a_climb_is_refused_where_no_step_is_local():
    with pytest.raises(ConfigError, match="correction is fedsam; it changes local steps, and this strategy takes none"):
        FedSAM().check(facts(FedSGD(), FedSAM()))


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (FedSAM, {"rho": -0.1}, "rho is -0.1; it must be 0 or more"),
        (LabelSmoothing, {"smoothing": 1.0}, "smoothing is 1.0; it is 0 to below 1"),
        (FedLC, {"tau": float("inf")}, "tau is inf; it must be 0 or more"),
    ],
)
def test_a_correction_refuses_values_that_make_no_sense(kind, settings, sentence):
    with pytest.raises(FieldError) as caught:
        kind(**settings)
    assert str(caught.value).startswith(sentence)
