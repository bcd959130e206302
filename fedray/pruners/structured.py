"""Structured pruning by the server: filters, neurons, heads or residual blocks go, and the model runs smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from fedray.prune.schedule import Kind
from fedray.prune.unit_scores import RANKINGS, UNIT_SCORES, Ranking, UnitScore, alive, choose_units, kept_units
from fedray.pruners.on_schedule import CutsUnits
from fedray.round import Context, Policy, Server, refuse
from fedray.tree import Mask


@final
@dataclass(frozen=True, kw_only=True)
class Structured(CutsUnits, Policy[None, None]):
    """Remove the units of the averaged model that have the lowest score, with all that belongs to them.

    Li et al. 2017, "Pruning filters for efficient ConvNets", section 3 (L1 norm, the same share of each layer);
    Fang et al. 2023, "DepGraph" (coupled layers, and a score of the whole group); Liu et al. 2017, "Network slimming"
    (scales of batch normalisation, one ranking), without its penalty in training; He et al. 2019 (FPGM). Deviations:
    it is the server that prunes, right after it has averaged, so all clients share one mask; units that are coupled
    are ranked by one score; the bias and the norm of a unit go too, so that the masked model is the smaller one.

    sparsity: final fraction of the units removed, in [0, 1), of each group, or of all under a global ranking; what
              stays is rounded up. Of weights more go: a matrix keeps the product of what stays of the units that it
              reads and of those that it computes.
    units:    which kinds may go: filter, neuron, head, block. Residual blocks are ranked against each other.
    score:    "l1", "l2", "group", "norm_scale" or "fpgm": see `prune.unit_scores`.
    ranking:  "local" ranks within each group, "global" all units by score / mean of their group.
    most:     under a global ranking, the largest fraction removed of a group, in [0, 1]; one unit stays in any case.
    schedule, start, finish, every: see `prune.schedule`; start 0 prunes the initial model. What is gone stays gone.
    shrink:   clients train the physically smaller model; if not, the whole one under a mask: the same but for rounding.
    """

    cuts: ClassVar[Literal["none", "weights", "structures", "both"]] = "structures"

    sparsity: float
    units: tuple[str, ...] = ("filter", "neuron", "head")
    score: UnitScore = "l1"
    ranking: Ranking = "local"
    most: float = 0.8
    schedule: Kind = "one_shot"
    start: int = 0
    finish: int = 0
    every: int = 1
    shrink: bool = True

    def __post_init__(self) -> None:
        self.refuse_schedule()
        refuse(self.score not in UNIT_SCORES, "score", self.score, f"choose {', '.join(UNIT_SCORES)}")
        refuse(self.ranking not in RANKINGS, "ranking", self.ranking, f"choose {' or '.join(RANKINGS)}")
        too_little = self.ranking == "global" and self.most < self.sparsity
        rule = "it is a fraction of a group's units, at most 1, and under a global ranking at least the sparsity"
        refuse(not 0.0 <= self.most <= 1.0 or too_little, "most", self.most, rule)

    @property
    def ranks_by(self) -> UnitScore:
        return self.score

    def chosen(self, server: Server, sparsity: float, ctx: Context) -> Mask:
        assert ctx.structure is not None
        within = alive(ctx.structure, self.units, server.mask)
        kept = choose_units(
            ctx.structure,
            server.params,
            sparsity,
            within=within,
            score=self.score,
            ranking=self.ranking,
            most=self.most,
        )
        return ctx.structure.mask(kept_units(ctx.structure, kept))
