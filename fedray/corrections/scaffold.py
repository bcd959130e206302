"""SCAFFOLD: each client steps with what it knows of everybody's gradient and its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from fedray import tree
from fedray.errors import ConfigError
from fedray.round import Context, Fit, Job, Message, Part, PartSpec, Policy, RunFacts, Server
from fedray.sums import Sums
from fedray.tree import Layout, Mask, Tree, restrict


@final
@dataclass(frozen=True, kw_only=True)
class Scaffold(Policy[Tree, Tree | None]):
    """Stochastic controlled averaging (Karimireddy et al. 2020, algorithm 1, option II).

    Local steps follow g - c_i + c. After K of them at rate lr, from x to y, c_i+ = c_i - c + (x - y) / (K lr), and
    the client sends c_i+ - c_i; the server adds |S| / N of their mean to c, clients counting once each. Both start at
    zero, so that the first round is the strategy's own and c stays the mean of all c_i. Controls travel as float32
    whatever the wire is, one more model each way. The paper's server rate is the strategy's `lr`, and it averages
    uniformly: strategy.weight_by=uniform. With momentum, which the paper does not have, K is the effective number of
    steps (Wang et al. 2020, section 4), so that a control still is a mean gradient.

    Under masks, which the paper does not have: controls live on the mask and start at zero on what grows, also on a
    weight that was dropped and grew back in one round. A client that was away while a weight left and returned does
    not know it, and keeps its control there.
    """

    def check(self, run: RunFacts) -> None:
        none = Layout((), ())
        if not any("delta" in policy.parts(none, none) for _, policy in run.policies):
            raise ConfigError("correction is scaffold; it needs clients that take local steps: set strategy=fedavg")

    def warns(self, run: RunFacts) -> tuple[str, ...]:
        plain, used = {"name": "sgd", "momentum": 0.0, "clip_norm": None}, run.optim
        keys = {"name": "optimizer"}
        found = [
            f"trainer.{keys.get(name, name)}={getattr(used, name)}"
            for name, value in plain.items()
            if getattr(used, name) != value
        ]
        if not found:
            return ()
        return (
            f"with {' and '.join(found)} this is not the paper's algorithm, which steps by plain SGD: take "
            "trainer.optimizer=sgd trainer.momentum=0 trainer.clip_norm=null for that",
        )

    def parts(self, params: Layout, buffers: Layout) -> Mapping[str, PartSpec]:
        return {
            "control": PartSpec(layout=params, direction="down", lossy=False, absolute=True),
            "control_change": PartSpec(layout=params, direction="up", lossy=False),
        }

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, Tree]:
        return server, Tree.zeros(server.params.layout)

    def send(self, server: Server, message: Message, memory: Tree, ctx: Context) -> Message:
        return message.put("control", Part(value=_under(memory, server.mask), support=server.mask))

    def begin(self, message: Message, job: Job, memory: Tree | None, ctx: Context) -> tuple[Message, Job, Tree | None]:
        control = message["control"]
        if memory is None and not control.flat.any():
            return message, job, memory  # nothing to add: the very steps of a run without controls
        drift = control if memory is None else tree.sub(control, restrict(memory, message.mask))
        return message, replace(job, drift=drift if job.drift is None else tree.add(job.drift, drift)), memory

    def end(self, fit: Fit, message: Message, memory: Tree | None, ctx: Context) -> tuple[Fit, Message, Tree | None]:
        if fit.num_steps == 0 or fit.lr == 0.0:
            return fit, message, memory
        start, control, mask = fit.received["params"], fit.received["control"], fit.received.mask
        mine = Tree.zeros(control.layout) if memory is None else restrict(memory, mask)
        assert ctx.job is not None
        # With momentum a gradient moves a weight several times: controls that much too long would make steps diverge.
        steps = ctx.job.optim.effective_steps(fit.num_steps, lr=fit.lr)
        way = tree.scale(tree.sub(start, fit.params), 1.0 / (steps * fit.lr))
        new = tree.add(tree.sub(mine, control), way)
        new = restrict(fit.without_restarts(new), mask)  # also where a client trained beyond it
        # Everybody vouches for what everybody was sent, also where a client has dropped it: its control is zero there.
        return fit, message.put("control_change", Part(value=tree.sub(new, mine), support=mask)), new

    def settle(self, server: Server, sums: Sums, memory: Tree, ctx: Context) -> tuple[Server, Sums, Tree]:
        if "control_change" not in sums:
            return server, sums, memory
        share = sums.count("control_change") / ctx.num_clients
        mean = sums.mean("control_change", otherwise=0.0)
        return server, sums, tree.add(_under(memory, server.mask), mean, share)


def _under(control: Tree, mask: Mask | None) -> Tree:
    """The control under a mask; the very same where nothing lies outside, so that one payload serves all clients."""
    return control if mask is None or not control.flat[~mask.flat].any() else restrict(control, mask)
