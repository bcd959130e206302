"""FedAdagrad, FedAdam and FedYogi: the server takes the mean difference as a gradient for an adaptive optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fedray import tree
from fedray.round import Policy
from fedray.strategies.adaptive import Adaptive, Decaying, Moments
from fedray.tree import Tree


@final
@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Adaptive, Policy[Moments | None, None]):
    """FedAdagrad (Reddi et al. 2021, algorithm 2): v <- v + d^2. The other settings are those of `Adaptive`; with
    initial "zero" and beta1 0 it is torch.optim.Adagrad on the server."""

    lr: float = 0.1
    beta1: float = 0.0

    def second(self, old: Tree, square: Tree) -> Tree:
        return tree.add(old, square)


@final
@dataclass(frozen=True, kw_only=True)
class FedAdam(Decaying, Policy[Moments | None, None]):
    """FedAdam (Reddi et al. 2021, algorithm 2): v <- beta2 v + (1 - beta2) d^2. The other settings are those of
    `Decaying`; with initial "zero" and bias correction it is torch.optim.Adam on the server."""

    def second(self, old: Tree, square: Tree) -> Tree:
        return tree.add(tree.scale(old, self.beta2), square, 1.0 - self.beta2)


@final
@dataclass(frozen=True, kw_only=True)
class FedYogi(Decaying, Policy[Moments | None, None]):
    """FedYogi (Reddi et al. 2021, algorithm 2): v <- v - (1 - beta2) d^2 sign(v - d^2), which lets v grow no faster
    than the difference does. The other settings are those of `Decaying`."""

    def second(self, old: Tree, square: Tree) -> Tree:
        towards = Tree(old.layout, square.flat * (old.flat - square.flat).sign())
        return tree.add(old, towards, -(1.0 - self.beta2))
