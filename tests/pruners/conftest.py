"""A federation small enough to do by hand: client c pulls the weights towards a target of its own.

The loss of client c is |w - target_c|^2 / 2, so its gradient at any point is w - target_c, also at pruned
coordinates, and everything that a policy computes can be checked on paper.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fedray.keys import Key
from fedray.round import ClientInfo, Context, Fit, Job, Message, Optim, RunFacts, Server
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, restrict

sys.path.insert(0, str(Path(__file__).parent))

LAYOUT = Layout(("fc.weight", "fc.bias", "out.weight"), ((4, 10), (4,), (3, 4)))
STATS = Layout(("bn.mean",), ((3,),))


def draw(layout, *names):
    return Tree(layout, torch.randn(layout.size, generator=Key.of(0).fold(*names).torch()))


@dataclass(frozen=True, kw_only=True)
class World:
    layout: Layout = LAYOUT
    stats: Layout = STATS
    prunable: tuple[str, ...] = ("fc.weight", "out.weight")
    sizes: tuple[int, ...] = (10, 30, 5)
    num_steps: int = 3
    lr: float = 0.3

    @property
    def server(self):
        return Server(params=draw(self.layout, "origin"), buffers=draw(self.stats, "stats"))

    def target(self, client):
        return draw(self.layout, "target", client)

    def probe(self, client):
        def look(params, _, mask, *, wants, batch_size):
            assert wants == {"grad"}
            assert batch_size is None or 1 <= batch_size <= self.sizes[client]
            point = restrict(params, mask)
            return {}, {"grad": Tree(self.layout, point.flat - self.target(client).flat)}

        return look

    def ctx(self, number, client=None, seed=0):
        key = Key.of(seed).fold("round", number)
        facts = Context(
            run_key=Key.of(0),
            round=number,
            key=key,
            num_clients=len(self.sizes),
            cohort=tuple(range(len(self.sizes))) if number else (),
            origin=self.server.params,
            prunable=self.prunable,
            lr=self.lr,
        )
        if client is None:
            return facts
        info = ClientInfo(id=client, num_examples=self.sizes[client])
        return replace(facts, key=key.fold("client", client), client=info, probe=self.probe(client), job=self.job())

    def job(self):
        return Job(
            params=Tree.zeros(self.layout),
            buffers=Tree.zeros(self.stats),
            mask=None,
            num_steps=self.num_steps,
            batch_size=2,
            lr=self.lr,
            optim=Optim(),
        )

    def train(self, job, received, client):
        params, total = restrict(job.params, job.mask), torch.zeros(self.layout.size)
        for _ in range(job.num_steps):
            gradient = params.flat - self.target(client).flat
            total = total + gradient
            pull = job.prox * (params.flat - received["params"].flat)
            params = restrict(Tree(self.layout, params.flat - job.lr * (gradient + pull)), job.mask)
        return Fit(
            received=received,
            params=params,
            buffers=Tree(self.stats, job.buffers.flat + client),
            mask=job.mask,
            num_examples=self.sizes[client],
            num_steps=job.num_steps,
            lr=job.lr,
            loss=0.0,
            evidence={"grad_sum": Tree(self.layout, total)},
        )

    def start(self, *policies, seed=0):
        server = self.server
        for policy in policies:
            server, _ = policy.init_server(server, self.ctx(0, seed=seed))
        return server

    def answer(self, policies, server, number, client):
        """One client's half of a round: its job, its fit after `end`, and what it uploads."""
        ctx, message = self.ctx(number, client), Message()
        for policy in policies:
            message = policy.send(server, message, None, ctx)
        received, job = message, self.job()
        for policy in reversed(policies):
            message, job, _ = policy.begin(message, job, None, ctx)
        fit, answer = self.train(job, received, client), Message()
        for policy in policies:
            fit, answer, _ = policy.end(fit, answer, None, ctx)
        return job, fit, answer

    def round(self, policies, server, number, clients=None):
        """One round with all clients, or these; returns the server after it, and the uploads."""
        sums, uploads = Sums(), []
        for client in range(len(self.sizes)) if clients is None else clients:
            uploads.append(self.answer(policies, server, number, client)[2])
            sums.add(uploads[-1])
        for policy in reversed(policies):
            server, sums, _ = policy.settle(server, sums, None, self.ctx(number))
        return server, uploads

    def run(self, policies, rounds, seed=0):
        """The server after each round, the start first."""
        servers = [self.start(*policies, seed=seed)]
        for number in range(1, rounds + 1):
            servers.append(self.round(policies, servers[-1], number)[0])
        return servers

    def facts(self, *policies, rounds=20, epochs=1.0, steps=None, **optim):
        named = tuple((type(policy).__name__.lower(), policy) for policy in policies)
        return RunFacts(
            rounds=rounds, num_clients=3, cohort=3, optim=Optim(**optim), epochs=epochs, steps=steps, policies=named
        )

    def kept(self, server):
        return sum(server.mask.counts(self.prunable).values())

    def all_prunable(self):
        return sum(self.layout.spans[name].stop - self.layout.spans[name].start for name in self.prunable)

    def mask(self, seed, share=0.5):
        flat = torch.rand(self.layout.size, generator=Key.of(seed).torch()) < share
        flat[self.layout.spans["fc.bias"]] = True
        return Mask(self.layout, flat)


@pytest.fixture
def world():
    return World()
