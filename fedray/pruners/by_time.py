"""How long a round lasts, as settings, and the mask that learns most per second of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from fedray.errors import ConfigError
from fedray.prune.allocate import total_kept
from fedray.prune.search import reconfigure, seconds_of
from fedray.round import Context, RunFacts, Server, refuse
from fedray.tree import Mask, Tree

Flops = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class SearchesByTime(ABC):
    """What a policy has that looks for masks with `prune.search`; it names this before `Policy` among its bases.

    removal, half_life: removal * 0.5^(r / half_life) of a tensor's kept weights are taken out in round r.
    target_sparsity, finish: what is put in stays below a bound, which falls linearly from everything in round 0 to this
                     sparsity in round `finish` (of the run at the latest) and stays; what is left in may be above it.
                     0 for no bound, and then `finish` is not read.
    constant_s, transfer_s, computing_s, flops_per_second: how long a round lasts: see `prune.search.seconds_of`.
    """

    removal: float = 0.3
    half_life: float = 10000.0
    target_sparsity: float = 0.0
    finish: int = 10000
    constant_s: float | None = None
    transfer_s: float = 5.56e-6
    computing_s: Mapping[str, float] | None = None
    flops_per_second: float = 1e9

    def __post_init__(self) -> None:
        refuse(not 0.0 <= self.removal <= 1.0, "removal", self.removal, "it is the fraction taken out, 0 to 1")
        for name in ("half_life", "constant_s", "transfer_s", "flops_per_second"):
            value = getattr(self, name)
            refuse(value is not None and not value > 0.0, name, value, "it must be above 0")
        target = self.target_sparsity
        refuse(not 0.0 <= target < 1.0, "target_sparsity", target, "it is 0 to below 1, and 0 bounds nothing")
        refuse(self.finish < 1, "finish", self.finish, "it is a round, at least 1")
        for name, seconds in (self.computing_s or {}).items():
            refuse(not seconds >= 0.0, f"computing_s.{name}", seconds, "it is a number of seconds, 0 or more")

    def check(self, run: RunFacts) -> None:
        if self.target_sparsity > 0.0 and self.finish > run.rounds:
            raise ConfigError(
                f"pruner.finish is {self.finish}; it must be at most rounds ({run.rounds}), or the target_sparsity of "
                f"{self.target_sparsity:g} never bounds the size; lower it or raise rounds"
            )
        known = run.prunable or tuple(run.kinds or ())
        for name in self.computing_s or ():
            if known and name not in known:
                raise ConfigError(
                    f"pruner.computing_s names {name!r}; it has seconds by the names of what may be cut here, which "
                    f"are {', '.join(known)}"
                )

    @abstractmethod
    def init_server(self, server: Server, ctx: Context) -> tuple[Server, Flops]:
        """Its memory at the server is the FLOPs of an example by tensor."""

    def next_mask(
        self, params: Tree, mask: Mask, importance: Tree, flops: Flops, examples: float, number: int, ctx: Context
    ) -> Mask:
        """Reconfigure. flops: of an example by tensor. examples: that a client trains on in a round. number: its."""
        layout, names = params.layout, ctx.prunable
        constant_s, seconds = seconds_of(
            layout,
            names,
            flops,
            examples,
            constant_s=self.constant_s,
            transfer_s=self.transfer_s,
            computing_s=self.computing_s,
            flops_per_second=self.flops_per_second,
        )
        removal = self.removal * 0.5 ** (number / self.half_life)
        most = total_kept(layout, names, self.target_sparsity * min(number / self.finish, 1.0))
        return reconfigure(params, importance, mask, seconds, constant_s, removal=removal, most=most)
