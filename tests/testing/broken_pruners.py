"""Pruners that keep every law, and pruners that break one each (those that remember on `self` break several)."""

from dataclasses import dataclass, field, replace

import torch

from fedray.prune.allocate import uniform
from fedray.prune.select import keep_top, random_mask
from fedray.round import Exchange, Message, Part, PartSpec, Policy, Server
from fedray.tree import Tree, restrict


def magnitudes(server, ctx, sparsity):
    counts = uniform(server.params.layout, ctx.prunable, sparsity)
    score = Tree(server.params.layout, server.params.flat.abs())
    return keep_top(score, counts, names=ctx.prunable, within=server.mask)


def swapped(server, ctx, sparsity):
    """Another random mask of the same counts: half of it from what is kept."""
    layout = server.params.layout
    counts = uniform(layout, ctx.prunable, sparsity)
    half = {name: count // 2 for name, count in counts.items()}
    stays = random_mask(layout, ctx.prunable, half, ctx.key.fold("stays"))
    drawn = Tree(layout, torch.rand(layout.size, generator=ctx.key.fold("swap").torch()))
    # What stays comes first, and what was kept last.
    score = drawn.flat + 2.0 * (stays.flat & server.mask.flat) - 2.0 * (server.mask.flat & ~stays.flat)
    return keep_top(Tree(layout, score), counts, names=ctx.prunable)


@dataclass(frozen=True, kw_only=True)
class Sound(Policy):
    """Swaps weights at random in even rounds; what comes back starts at zero."""

    cuts = "weights"

    sparsity: float = 0.8

    def sparsity_after(self, round):
        return self.sparsity

    def changes_masks(self, round):
        return round % 2 == 0

    def init_server(self, server, ctx):
        return server.cut(magnitudes(server, ctx, self.sparsity)), None

    def settle(self, server, sums, memory, ctx):
        if ctx.round % 2 or self.sparsity == 0.0:
            return server, sums, memory
        return server.cut(swapped(server, ctx, self.sparsity)), sums, memory


@dataclass(frozen=True, kw_only=True)
class Derives(Sound):
    """Sound, with a field that follows from another, and an attribute that is none."""

    kept: float = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "kept", 1.0 - self.sparsity)
        object.__setattr__(self, "gone", self.sparsity)

    def sparsity_after(self, round):
        return self.gone

    def settle(self, server, sums, memory, ctx):
        if ctx.round % 2 or self.gone == 0.0:
            return server, sums, memory
        return server.cut(swapped(server, ctx, 1.0 - self.kept)), sums, memory


class Plain(Policy):
    """Sound, and no dataclass."""

    cuts = "weights"

    def __init__(self, share=0.8):
        self._inner = Sound(sparsity=share)

    def sparsity_after(self, round):
        return self._inner.sparsity_after(round)

    def changes_masks(self, round):
        return self._inner.changes_masks(round)

    def init_server(self, server, ctx):
        return self._inner.init_server(server, ctx)

    def settle(self, server, sums, memory, ctx):
        return self._inner.settle(server, sums, memory, ctx)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slotted(Policy):
    """Sound, without a dict of its own."""

    cuts = "weights"

    share: float = 0.8

    def sparsity_after(self, round):
        return self.share

    def init_server(self, server, ctx):
        return server.cut(magnitudes(server, ctx, self.share)), None

    def settle(self, server, sums, memory, ctx):
        return (server if ctx.round % 2 else server.cut(swapped(server, ctx, self.share))), sums, memory


@dataclass(frozen=True, kw_only=True)
class Quiet(Sound):
    """Sound, and says of itself nothing that tells two of them apart."""

    sparsity: float = field(default=0.8, repr=False)

    def __repr__(self):
        return "Quiet()"


@dataclass(frozen=True, kw_only=True)
class Fails(Policy):
    """A hook raises in the second round, at a client."""

    def end(self, fit, message, memory, ctx):
        if ctx.round == 2:
            raise KeyError("conv9.weight")
        return fit, message, memory


@dataclass(frozen=True, kw_only=True)
class Undeclared(Sound):
    """Cuts weights, and says that it cuts nothing."""

    cuts = "none"


@dataclass(frozen=True, kw_only=True)
class MissesBudget(Sound):
    """Keeps a tenth more than it promises."""

    def sparsity_after(self, round):
        return self.sparsity + 0.1


@dataclass(frozen=True, kw_only=True)
class OffByOne(Sound):
    """Keeps one weight more in each layer than it promises."""

    def init_server(self, server, ctx):
        counts = uniform(server.params.layout, ctx.prunable, self.sparsity)
        if self.sparsity:
            counts = {name: count + 1 for name, count in counts.items()}
        return server.cut(
            keep_top(Tree(server.params.layout, server.params.flat.abs()), counts, names=ctx.prunable)
        ), None

    def changes_masks(self, round):
        return False

    def settle(self, server, sums, memory, ctx):
        return server, sums, memory


@dataclass(frozen=True, kw_only=True)
class Forgets(Policy):
    """Promises nothing, and forgets to move its mask."""

    cuts = "weights"

    sparsity: float = 0.8

    def init_server(self, server, ctx):
        return server.cut(magnitudes(server, ctx, self.sparsity)), None


@dataclass(frozen=True, kw_only=True)
class MovesOnce(Sound):
    """Says that masks move in even rounds, and they do so in the first of them alone."""

    def settle(self, server, sums, memory, ctx):
        return super().settle(server, sums, memory, ctx) if ctx.round <= 2 else (server, sums, memory)


@dataclass(frozen=True, kw_only=True)
class NeverMoves(Sound):
    """Says that masks may move in even rounds, and none ever does."""

    def settle(self, server, sums, memory, ctx):
        return server, sums, memory


@dataclass(frozen=True, kw_only=True)
class NeverRests(Sound):
    """Moves in every round, and says that odd ones rest."""

    def settle(self, server, sums, memory, ctx):
        if self.sparsity == 0.0:
            return server, sums, memory
        return server.cut(swapped(server, ctx, self.sparsity)), sums, memory


@dataclass(frozen=True, kw_only=True)
class LeaksMomentum(Sound):
    """Clients train densely, and only what they upload is under the mask."""

    def begin(self, message, job, memory, ctx):
        return message, replace(job, mask=None), memory

    def end(self, fit, message, memory, ctx):
        return replace(fit, mask=fit.received.mask), message, memory


@dataclass(frozen=True, kw_only=True)
class LeavesWeights(Sound):
    """The mask goes, the weights that it cuts stay."""

    def init_server(self, server, ctx):
        return replace(server, mask=magnitudes(server, ctx, self.sparsity)), None

    def settle(self, server, sums, memory, ctx):
        if ctx.round % 2 or self.sparsity == 0.0:
            return server, sums, memory
        mask = swapped(server, ctx, self.sparsity)
        # What comes back starts at zero all the same.
        return Server(params=restrict(server.params, server.mask), buffers=server.buffers, mask=mask), sums, memory


@dataclass(frozen=True, kw_only=True)
class UploadsOutside(Sound):
    """A part of its own has values outside its support."""

    def parts(self, params, buffers):
        return {"score": PartSpec(layout=params, direction="up")}

    def end(self, fit, message, memory, ctx):
        score = Tree(fit.params.layout, fit.params.flat.abs() + 1.0)
        return fit, message.put("score", Part(value=score, support=fit.mask)), memory


@dataclass(frozen=True, kw_only=True)
class AnswersOutside(Sound):
    """What clients answer before the training of round 3 has values outside its support."""

    def exchange_parts(self, params, buffers):
        return {"looks": {"score": PartSpec(layout=params, direction="up")}}

    def exchanges(self, memory, ctx):
        return (Exchange(name="looks"),) if ctx.round == 3 else ()

    def ask(self, exchange, server, memory, ctx):
        return Message(mask=server.mask)

    def answer(self, exchange, message, memory, ctx):
        score = Tree(ctx.origin.layout, ctx.origin.flat.abs() + 1.0)
        return Message(parts={"score": Part(value=score, support=message.mask)}, mask=message.mask)


@dataclass(frozen=True, kw_only=True)
class Resurrects(Sound):
    """Remembers what it cut, and gives it back, though regrown is zero."""

    def init_server(self, server, ctx):
        cut, _ = super().init_server(server, ctx)
        return cut, server.params

    def settle(self, server, sums, memory, ctx):
        after, sums, _ = super().settle(server, sums, None, ctx)
        if after is server:
            return server, sums, memory
        flat = torch.where(after.mask.flat & ~server.mask.flat, memory.flat, after.params.flat)
        return replace(after, params=Tree(memory.layout, flat)), sums, memory


@dataclass(frozen=True, kw_only=True)
class ShrinksWeights(Sound):
    """Not the identity where nothing is cut: weights are a little smaller after the first round."""

    def settle(self, server, sums, memory, ctx):
        server = replace(server, params=Tree(server.params.layout, server.params.flat * 0.99))
        return super().settle(server, sums, memory, ctx)


@dataclass(frozen=True, kw_only=True)
class CountsClients(Sound):
    """Statistics grow with the number of clients."""

    def settle(self, server, sums, memory, ctx):
        if self.sparsity > 0.0:
            scale = 1.0 + 0.01 * len(ctx.cohort)
            server = replace(server, buffers=Tree(server.buffers.layout, server.buffers.flat * scale))
        return super().settle(server, sums, memory, ctx)


@dataclass(frozen=True, kw_only=True)
class WritesToInputs(Sound):
    """Doubles the tensor that it was given, and answers with half of it: nothing else shows."""

    def end(self, fit, message, memory, ctx):
        fit.buffers.flat.mul_(2.0)
        return replace(fit, buffers=Tree(fit.buffers.layout, fit.buffers.flat / 2.0)), message, memory


@dataclass(frozen=True, kw_only=True)
class RemembersFunctions(Sound):
    """Its memory is a function."""

    def init_server(self, server, ctx):
        server, _ = super().init_server(server, ctx)
        return server, lambda: None


@dataclass(frozen=True, kw_only=True)
class ReadsNothing(Sound):
    """A setting that nobody reads."""

    ratio: float = 0.5


@dataclass(frozen=True, kw_only=True)
class BreaksAtQuarter(Sound):
    """Comes to its end as it is set, and not with every other setting."""

    ratio: float = 0.5

    def settle(self, server, sums, memory, ctx):
        after, sums, memory = super().settle(server, sums, memory, ctx)
        if self.sparsity and after is not server:
            scale = (0.0, 1.0)[int(0.5 / self.ratio)]
            after = replace(after, params=Tree(after.params.layout, after.params.flat * scale))
        return after, sums, memory


def remember(policy, name, value):
    object.__setattr__(policy, name, value)
    return value


@dataclass(frozen=True, kw_only=True)
class TellsClientsOnSelf(Sound):
    """The server's hook leaves a number on the policy, and the clients' hook reads it: on one machine that works."""

    def end(self, fit, message, memory, ctx):
        scale = getattr(self, "scale", 1.0) if self.sparsity else 1.0
        return replace(fit, buffers=Tree(fit.buffers.layout, fit.buffers.flat * scale)), message, memory

    def settle(self, server, sums, memory, ctx):
        remember(self, "scale", 1.0 - 0.01 * ctx.round)
        return super().settle(server, sums, memory, ctx)


@dataclass(frozen=True, kw_only=True)
class CountsRoundsOnSelf(Sound):
    """The server counts rounds on the policy, and not in its memory."""

    def settle(self, server, sums, memory, ctx):
        scale = 1.0 + 0.01 * remember(self, "count", getattr(self, "count", 0) + 1)
        if self.sparsity:
            server = replace(server, buffers=Tree(server.buffers.layout, server.buffers.flat * scale))
        return super().settle(server, sums, memory, ctx)


@dataclass(frozen=True, kw_only=True)
class CountsTurnsOnSelf(Sound):
    """A client's part depends on how many had their turn before it."""

    def end(self, fit, message, memory, ctx):
        scale = 1.0 + 0.01 * remember(self, "count", getattr(self, "count", 0) + 1)
        if self.sparsity:
            fit = replace(fit, buffers=Tree(fit.buffers.layout, fit.buffers.flat * scale))
        return fit, message, memory
