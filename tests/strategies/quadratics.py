"""A federation of quadratics: client c has the loss bend_c / 2 |w - target_c|^2, and memories last from round to round.

The gradient of client c at w is bend_c (w - target_c), so the optimum of any mean of losses is known on paper.
"""

from dataclasses import dataclass, field, replace

import torch

from fedray.keys import Key
from fedray.round import ClientInfo, Context, Fit, Job, Message, Optim, Part, RunFacts, Server
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, restrict

LAYOUT = Layout(("fc.weight", "fc.bias", "out.weight"), ((4, 10), (4,), (3, 4)))
NOTHING = Layout((), ())
PLAIN = Optim()


def draw(*names, layout=LAYOUT):
    return Tree(layout, torch.randn(layout.size, generator=Key.of(0).fold(*names).torch()))


def some(seed, share=0.5):
    return Mask(LAYOUT, torch.rand(LAYOUT.size, generator=Key.of(seed).torch()) < share)


def context(number=1, *, num_clients=3, server_lr=1.0, lr=0.1, client=None, **facts):
    info = None if client is None else ClientInfo(id=client, num_examples=10, **facts)
    return Context(
        run_key=Key.of(0),
        round=number,
        key=Key.of(0).fold(number),
        num_clients=num_clients,
        cohort=tuple(range(num_clients)),
        origin=draw("origin"),
        prunable=("fc.weight", "out.weight"),
        lr=lr,
        server_lr=server_lr,
        client=info,
        job=None if client is None else job(lr=lr),
    )


def job(lr=0.1, **changes):
    """A client's training as it is configured."""
    facts = {"num_steps": 3, "batch_size": 2, "optim": PLAIN, **changes}
    return Job(params=draw("origin"), buffers=Tree.zeros(NOTHING), mask=None, lr=lr, **facts)


def facts(*policies, objective=None, kinds=None, epochs=1, steps=None, **optim):
    named = tuple((type(policy).__name__.lower(), policy) for policy in policies)
    return RunFacts(
        rounds=9,
        num_clients=3,
        cohort=3,
        optim=Optim(**optim),
        epochs=epochs,
        steps=steps,
        policies=named,
        objective=objective,
        kinds=kinds,
    )


def sums_of(*deltas, weights=None, supports=None):
    """What the server hears where clients send these differences."""
    sums = Sums()
    for at, delta in enumerate(deltas):
        support = None if supports is None else supports[at]
        weight = 1.0 if weights is None else weights[at]
        part = Part(value=restrict(delta, support), weight=weight, support=support)
        sums.add(Message(parts={"delta": part}))
    return sums


@dataclass
class Federation:
    """Runs policies round by round; `steps`, `bends` and `sizes` are by client."""

    policies: tuple
    steps: tuple[int, ...] = (3, 3, 3)
    bends: tuple[float, ...] = (1.0, 1.0, 1.0)
    sizes: tuple[int, ...] = (10, 30, 5)
    lr: float = 0.1
    optim: Optim = PLAIN
    server: Server = None
    memories: list = field(default_factory=list)
    kept: dict = field(default_factory=dict)
    fits: dict = field(default_factory=dict)
    uploads: dict = field(default_factory=dict)

    def __post_init__(self):
        self.server = Server(params=draw("origin"), buffers=Tree.zeros(NOTHING))
        for policy in self.policies:
            self.server, memory = policy.init_server(self.server, self.ctx(0))
            self.memories.append(memory)

    @property
    def count(self):
        return len(self.steps)

    def target(self, client):
        return draw("target", client)

    def gradient(self, client, params):
        return self.bends[client] * (params - self.target(client).flat)

    def optimum(self, weights=None):
        """Where the weighted mean of the losses is least, float64."""
        shares = [w * b for w, b in zip(weights or [1.0] * self.count, self.bends, strict=True)]
        return sum(s * self.target(c).flat.double() for c, s in enumerate(shares)) / sum(shares)

    def ctx(self, number, client=None):
        ctx = context(number, num_clients=self.count, lr=self.lr)
        if client is None:
            return ctx
        info = ClientInfo(id=client, num_examples=self.sizes[client])
        return replace(ctx, client=info, job=self.job(client))

    def train(self, job, received, client):
        start = params = restrict(job.params, job.mask).flat
        velocity = torch.zeros(LAYOUT.size)
        for _ in range(job.num_steps):
            gradient = self.gradient(client, params) + job.prox * (params - start)
            if job.drift is not None:
                gradient = gradient + job.drift.flat
            velocity = job.optim.momentum * velocity + gradient
            step = gradient + job.optim.momentum * velocity if job.optim.nesterov else velocity
            params = restrict(Tree(LAYOUT, params - job.lr * step), job.mask).flat
        return Fit(
            received=received,
            params=Tree(LAYOUT, params),
            buffers=job.buffers,
            mask=job.mask,
            num_examples=self.sizes[client],
            num_steps=job.num_steps,
            lr=job.lr,
            loss=0.0,
        )

    def job(self, client):
        return Job(
            params=Tree.zeros(LAYOUT),
            buffers=Tree.zeros(NOTHING),
            mask=None,
            num_steps=self.steps[client],
            batch_size=2,
            lr=self.lr,
            optim=self.optim,
        )

    def client(self, number, client):
        """One client's half: its job as the last `begin` left it is trained, and its answer returned."""
        ctx, message = self.ctx(number, client), Message()
        for policy, memory in zip(self.policies, self.memories, strict=True):
            message = policy.send(self.server, message, memory, ctx)
        job = self.job(client)
        memories = list(self.kept.get(client) or [policy.init_client(ctx) for policy in self.policies])
        received = message
        for at in reversed(range(len(self.policies))):
            message, job, memories[at] = self.policies[at].begin(message, job, memories[at], ctx)
        fit, answer = self.train(job, received, client), Message()
        for at, policy in enumerate(self.policies):
            fit, answer, memories[at] = policy.end(fit, answer, memories[at], ctx)
        self.kept[client], self.fits[client], self.uploads[client] = memories, fit, answer
        return answer

    def round(self, number, clients=None):
        sums = Sums()
        for client in range(self.count) if clients is None else clients:
            sums.add(self.client(number, client))
        for at in reversed(range(len(self.policies))):
            self.server, sums, self.memories[at] = self.policies[at].settle(
                self.server, sums, self.memories[at], self.ctx(number)
            )
        return self.server

    def run(self, rounds, cohorts=None):
        for number in range(1, rounds + 1):
            self.round(number, None if cohorts is None else cohorts[number % len(cohorts)])
        return self.server.params.flat
