# %% [markdown]
# # Add a pruner
#
# A pruner is one Python file and one yaml in a folder of your own, here `mine/`. This notebook writes them, checks them
# and runs them; [docs/write_a_pruner.md](../docs/write_a_pruner.md) says what every line is for. Both files are the
# ones of that page.
#
# The method: before the first round the server keeps the largest weights of each layer. From then on, every few rounds,
# it drops the smallest of those that are left and lets as many others grow at random.

# %%
import os
import sys
from pathlib import Path

import pandas

import fedray
from fedray.cli import main

# Set by the tests, which run this notebook with a smaller model for a few rounds.
TINY = ["rounds=7", "model.hidden=[20]"] if "FEDRAY_NOTEBOOKS_TINY" in os.environ else []
Path("mine/pruner").mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## One file

# %%
# %%writefile mine/swap.py
"""Swap the smallest weights for random ones, at the server."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch

from fedray.prune.allocate import uniform
from fedray.prune.regrow import drop, grow
from fedray.round import Context, Policy, Server, refuse
from fedray.sums import Sums
from fedray.tree import Mask, Tree


@final
@dataclass(frozen=True, kw_only=True)
class Swap(Policy[None, None]):
    """In every `every`-th round before `until` a `ratio` of each layer's weights is swapped for random ones.

    sparsity: fraction removed, in [0, 1), in every round.
    """

    cuts: ClassVar[Literal["weights"]] = "weights"

    sparsity: float
    ratio: float
    every: int
    until: int

    def __post_init__(self) -> None:
        refuse(not 0 <= self.sparsity < 1, "sparsity", self.sparsity, "it is the fraction removed, in [0, 1)")
        refuse(not 0 <= self.ratio <= 1, "ratio", self.ratio, "it is the fraction of kept weights swapped, 0 to 1")
        refuse(self.every < 1, "every", self.every, "it is a number of rounds, at least 1")
        refuse(self.until < 0, "until", self.until, "it is a round, and 0 freezes the first mask")

    def sparsity_after(self, round: int) -> float:
        return self.sparsity

    def changes_masks(self, round: int) -> bool:
        return 0 < round < self.until and round % self.every == 0

    def init_server(self, server: Server, ctx: Context) -> tuple[Server, None]:
        layout = server.params.layout
        counts = uniform(layout, ctx.prunable, self.sparsity)
        return server.cut(drop(server.params, Mask.full(layout), counts, names=ctx.prunable)), None

    def settle(self, server: Server, sums: Sums, memory: None, ctx: Context) -> tuple[Server, Sums, None]:
        if not self.changes_masks(ctx.round):
            return server, sums, memory
        assert server.mask is not None
        counts = server.mask.counts(ctx.prunable)
        fewer = {name: count - round(self.ratio * count) for name, count in counts.items()}
        left = drop(server.params, server.mask, fewer, names=ctx.prunable)
        layout = server.params.layout
        lots = Tree(layout, torch.rand(layout.size, generator=ctx.key.fold("swap").torch()))
        # Two cuts: a weight that is dropped and drawn again starts at zero like any other that grows.
        return server.cut(left).cut(grow(lots, left, counts, names=ctx.prunable)), sums, memory


# %% [markdown]
# ## One yaml

# %%
# %%writefile mine/pruner/swap.yaml
# The smallest weights make room for random ones
_target_: swap.Swap
# Fraction of the prunable weights removed, 0 to below 1
sparsity: 0.8
# Fraction of a layer's kept weights that is swapped, 0 to 1
ratio: 0.3
# Rounds between swaps
every: 5
# Swap only before this round
until: 100

# %% [markdown]
# ## Check it
#
# `fedray check` runs the pruner in a tiny federation and looks at the laws that every pruner keeps: the mask has the
# size that was promised, zeros stay zero, the bytes add up, a resumed run has the bits of one that was never cut off.
# [docs/conformance.md](../docs/conformance.md) lists them. A check that fails says which round, layer and weight it
# was.

# %%
# Python keeps a module once it is imported: with this, an edit of the cell above counts.
sys.modules.pop("swap", None)
assert main(["check", "mine/pruner/swap.yaml"]) == 0

# %% [markdown]
# ## Run it
#
# `config_dir` is what `--config-dir` is on the command line. The fields of the class are settings now: `pruner.every`,
# `pruner.ratio` and so on. `runtime=inline` trains in this process; with `runtime=ray` the file travels to the cluster
# by itself.

# %%
sys.modules.pop("swap", None)
overrides = ["pruner=swap", "pruner.every=3", "rounds=30", "runtime=inline"]
quiet = ["tracker.progress=none", "tracker.wandb.mode=disabled"]
run = fedray.run([*overrides, *quiet, *TINY], config_dir="mine")
rows = pandas.DataFrame(run.rows).set_index("round")
rows[["test/accuracy", "model/sparsity", "prune/churn", "prune/regrown", "wire/down_mask_bytes"]].head(8)

# %% [markdown]
# The sparsity stays and the mask moves in every third round. What it costs to send the new one is counted in the round
# after, when clients get it.
#
# ## Refuse what is wrong
#
# What `__post_init__` refuses is refused before anything starts, with the sentence from the file.

# %%
try:
    fedray.run(["pruner=swap", "pruner.ratio=2.0", "runtime=inline"], config_dir="mine")
except fedray.errors.ConfigError as error:
    print(error)

# %% [markdown]
# ## Next
#
# - `swap` composes with every strategy, correction, wire and runtime: add `correction=scaffold` or `wire=topk_int8`
#   above.
# - [03_compare_runs](03_compare_runs.ipynb) compares pruners; yours is `pruner=swap` there, with the same `config_dir`.
# - `fedray/pruners/feddst.py` prunes at clients, `fedray/round.py` has all hooks, `fedray/prune/` the kernels.
