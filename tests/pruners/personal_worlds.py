"""The world of conftest with clients that remember: masks of their own, and a gate that says what it is told."""

from dataclasses import dataclass, replace

from fedray.round import Message, Part
from fedray.sums import Sums


@dataclass
class Personal:
    """A run of these policies by hand, client by client. accuracy: what every validation gives."""

    world: object
    policies: list
    accuracy: float = 0.9

    def __post_init__(self):
        self.server = self.world.start(*self.policies)
        self.memories = {}
        self.known = {}
        self.judged = []  # (client, view) of every validation
        self.more = []  # (client, job) of every additional job
        self.number = 0

    def ctx(self, client):
        ctx = self.world.ctx(self.number, client)

        def validate(view):
            self.judged.append((client, view))
            return {"accuracy": self.accuracy, "loss": 1.0}

        def train(job, name):
            self.more.append((client, job))
            return self.world.train(job, Message(parts={"params": Part(value=job.params)}), client)

        return replace(ctx, validate=validate, train=train, known=self.known.get(client))

    def turn(self, client):
        """One client's half of a round: what it was sent, its job, its fit, what it sends."""
        ctx, down = self.ctx(client), Message()
        for policy in self.policies:
            down = policy.send(self.server, down, None, ctx)
        old = self.memories.get(client) or [policy.init_client(ctx) for policy in self.policies]
        message, job, new = down, self.world.job(), list(old)
        for at in reversed(range(len(self.policies))):
            message, job, new[at] = self.policies[at].begin(message, job, new[at], ctx)
        fit, up = self.world.train(job, down, client), Message()
        for at, policy in enumerate(self.policies):
            fit, up, new[at] = policy.end(fit, up, new[at], ctx)
        self.memories[client] = new
        self.known[client] = up.mask if up.mask is not None else down.mask
        return down, job, fit, up

    def round(self, clients=(0, 1, 2)):
        """One round; by client, what `turn` gives."""
        self.number += 1
        turns, sums = {client: self.turn(client) for client in clients}, Sums()
        for *_, up in turns.values():
            sums.add(up)
        for policy in reversed(self.policies):
            self.server, sums, _ = policy.settle(self.server, sums, None, self.world.ctx(self.number))
        return turns

    def kept(self, mask):
        return mask.counts(self.world.prunable)
