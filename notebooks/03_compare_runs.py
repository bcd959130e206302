# %% [markdown]
# # Compare runs
#
# A small grid of runs, then a table, figures and a page. Nothing of it is a script of your own: each is one command,
# and every command is a function here too.

# %%
import os
from datetime import datetime
from itertools import product
from pathlib import Path

from IPython.display import IFrame, Image

import fedray
from fedray.cli import main

# Set by the tests, which run this notebook with a smaller model for a few rounds.
tiny = "FEDRAY_NOTEBOOKS_TINY" in os.environ
TINY = ["rounds=5", "num_clients=10", "cohort=4", "trainer.epochs=1", "model.hidden=[20]"] if tiny else []
SEEDS = [0, 1] if tiny else [0, 1, 2]

# %% [markdown]
# ## Run a grid
#
# Two pruners at two sparsities, and no pruning at all, with three seeds each. The same seed has the same initial
# weights, cohorts and batches in every run, so differences can be taken seed by seed.
#
# `runtime=inline` runs them in this process, one after another, in about a minute. Many runs belong on a cluster: the
# same grid as a sweep is the command below. It runs as many at once as fit, and given again it skips what is finished.
#
# ```bash
# python -m fedray -m +experiment=quickstart rounds=20 pruner=gradual,random pruner.sparsity=0.8,0.95 seed=0,1,2
# ```

# %%
grid = Path("outputs/grid") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
methods = [["pruner=none"]]
for pruner, sparsity in product(["gradual", "random"], [0.8, 0.95]):
    methods.append([f"pruner={pruner}", f"pruner.sparsity={sparsity}"])
base = ["+experiment=quickstart", "rounds=20", "runtime=inline", "tracker.progress=none", "tracker.wandb.mode=disabled"]
for number, (method, seed) in enumerate(product(methods, SEEDS)):
    run = fedray.run([*base, *method, f"seed={seed}", *TINY], folder=grid / f"{number:02}")
    print(f"{number:02}  {' '.join(method):40} seed {seed}  {run.final['test/accuracy']:.3f}")

# %% [markdown]
# ## List

# %%
assert main(["runs", str(grid)]) == 0

# %% [markdown]
# ## Table
#
# Mean and standard deviation over seeds, the best of each column in bold. It is Markdown; `--format latex` and
# `--format csv` print the others, and `--out FILE` writes a file.

# %%
assert main(["table", str(grid), "--rows", "pruner", "--cols", "pruner.sparsity"]) == 0

# %% [markdown]
# With a baseline there are differences too, paired by seed, with their confidence intervals. Three seeds make wide
# ones.

# %%
assert main(["table", str(grid), "--baseline", "pruner=none"]) == 0

# %% [markdown]
# What it took to reach an accuracy, in megabytes: `never` is a setting that got there with no seed.

# %%
assert main(["table", str(grid), "--at", "target", "--target", "0.5", "--cost", "bytes"]) == 0

# %% [markdown]
# ## Figures
#
# PNG and PDF for a paper, and a json with every number that is drawn. [docs/reports.md](../docs/reports.md) has all
# kinds.

# %%
assert main(["plot", str(grid), "--kind", "accuracy-mb,accuracy-rounds,pareto"]) == 0

# %%
Image(grid / "figures" / "accuracy-mb.png", width=480)

# %%
Image(grid / "figures" / "pareto.png", width=480)

# %% [markdown]
# ## Page
#
# One file that needs no network: the table, curves to point at, megabytes by part, layers, clients, failures and
# settings. [docs/page.md](../docs/page.md) says what is on it. Open it in a browser if your editor does not show it
# here.

# %%
assert main(["report", str(grid), "--title", "Pruning digits"]) == 0

# %%
IFrame((grid / "report.html").as_posix(), width="100%", height=700)

# %% [markdown]
# ## Next
#
# - [docs/sweeps.md](../docs/sweeps.md) has grids of hundreds of runs, what they will take, and what happens when some
#   fail.
# - [docs/wandb.md](../docs/wandb.md) sends runs to Weights & Biases, and makes the comparison there.
