"""Contexts in which hooks can look at real models: an engine, clients with data of their own, and public data."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from fedray.keys import Key
from fedray.models import Task
from fedray.models.task import prunable_names
from fedray.round import ClientInfo, Context, Job, Optim, Server, View
from fedray.sums import Sums
from fedray.train import Engine, Samples

CLASSES = 3


@contextmanager
def one_thread():
    """As in an actor; several would wait for each other on models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Smooth, so that differences are as good as derivatives."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x)))


@dataclass(frozen=True)
class Looking:
    """sizes: examples of each client; the last rows are public."""

    engine: Engine
    sizes: tuple[int, ...] = (20, 6, 12)
    public: int = 15

    @classmethod
    def at(cls, build=Net, shape=(6,), **changes):
        return cls(Engine(Task(build=build), key=Key.of(0), sample_shape=shape, device="cpu", kind="eager"), **changes)

    def samples(self, client=None):
        start = sum(self.sizes[: len(self.sizes) if client is None else client])
        stop = start + (self.public if client is None else self.sizes[client])
        random = Key.of(5).numpy()
        x = torch.from_numpy(random.normal(size=(sum(self.sizes) + self.public, *self.engine.sample_shape))).float()
        y = torch.from_numpy(random.integers(0, CLASSES, len(x)))
        return Samples(x, y, torch.arange(start, stop), torch.tensor([0.0]), torch.tensor([1.0]), 1.0)

    @lru_cache  # noqa: B019
    def examples(self, client):
        samples = self.samples(client)
        x, y = samples.take(slice(0, len(samples)), torch.device("cpu"))
        return x.double(), y

    @property
    def server(self):
        return Server(params=self.engine.origin_params, buffers=self.engine.origin_buffers)

    def probe(self, client, key):
        def look(params, buffers, mask, **options):
            return self.engine.probe(View(params=params, buffers=buffers, mask=mask), samples, key, **options)

        samples = self.samples(client)
        return look

    def ctx(self, number, client=None, public=True):
        key = Key.of(0).fold("round", number)
        server = self.server
        facts = Context(
            round=number,
            key=key,
            run_key=Key.of(0),
            num_clients=len(self.sizes),
            cohort=(0, 1) if number else (),
            origin=server.params,
            prunable=prunable_names(self.engine.module, self.engine.task.scope),
            lr=0.1,
            flow=self.engine.flow,
            probe=self.probe(None, key) if public else None,
        )
        if client is None:
            return facts
        job = Job(
            params=server.params, buffers=server.buffers, mask=None, num_steps=1, batch_size=4, lr=0.1, optim=Optim()
        )
        key = key.fold("client", client)
        info = ClientInfo(id=client, num_examples=self.sizes[client])
        return replace(facts, key=key, client=info, job=job, probe=self.probe(client, key))

    def ask(self, policy, server, clients=(0, 1, 2)):
        """The answers of these clients before round 1, and the server that has learned from them."""
        (exchange,) = policy.exchanges(False, self.ctx(1, public=False))
        answers, sums = [], Sums()
        for client in clients:
            own = self.ctx(1, client)
            question = policy.ask(exchange, server, False, own)
            assert not question.parts
            answers.append(policy.answer(exchange, question, None, own))
            sums.add(answers[-1])
        return answers, *policy.learn(exchange, server, sums, False, self.ctx(1, public=False))

    def loss(self, flat, client, temperature=1.0):
        """The mean loss over a client's data at these weights, float64; a function that can be differentiated."""
        layout = self.engine.params_layout
        named = {name: flat[layout.spans[name]].view(layout.shape(name)) for name in layout.names}
        x, y = self.examples(client)
        outputs = torch.func.functional_call(self.engine.module, named, (x,))
        return F.cross_entropy(outputs / temperature, y)


def gradient(loss, flat):
    flat = flat.detach().requires_grad_()
    return torch.autograd.grad(loss(flat), flat)[0]


def along(loss, flat, at, step=1e-5):
    """The derivative of a function of the weights by a factor c on one of them at c = 1: a central difference."""
    ends = []
    for sign in (1, -1):
        there = flat.clone()
        there[at] *= 1 + sign * step
        ends.append(loss(there))
    return float(ends[0] - ends[1]) / (2 * step)


def all_along(loss, flat):
    return torch.tensor([along(loss, flat, at) for at in range(len(flat))], dtype=torch.float64)


def of_client(looking, client, **options):
    return partial(looking.loss, client=client, **options)


def nobody(policy, looking):
    """What the server makes of a question that nobody could be asked."""
    (exchange,) = policy.exchanges(False, looking.ctx(1))
    return policy.learn(exchange, looking.server, Sums(), False, looking.ctx(1))
