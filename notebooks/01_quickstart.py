# %% [markdown]
# # Quickstart
#
# Fifty clients train a small network on digits, ten of them in each round, and the server prunes 90 % of its weights on
# the way. This notebook starts that run from Python, reads what it recorded and draws it. It needs no account and no
# download beyond `pip install -c constraints.txt -e ".[notebooks]"`, and takes about ten seconds.

# %%
import os

import matplotlib.pyplot as plt
import pandas

import fedray
from fedray.cli import main

# Set by the tests, which run this notebook with a smaller model for a few rounds.
TINY = ["rounds=6", "num_clients=10", "model.hidden=[20]"] if "FEDRAY_NOTEBOOKS_TINY" in os.environ else []

# %% [markdown]
# ## Run
#
# The list is what stands after `python -m fedray` on a command line, and every setting can be in it.
#
# `runtime=inline` trains in this process, one client after another, so that the notebook works anywhere. Write
# `runtime=ray` and each client is an actor on a Ray cluster: on this machine, or on the one that
# `runtime.address=HOST:6379` names. The results are the same bits.

# %%
overrides = ["+experiment=quickstart", "seed=0", "runtime=inline"]
quiet = ["tracker.progress=none", "tracker.wandb.mode=disabled"]
run = fedray.run([*overrides, *quiet, *TINY])
print(run.folder)

# %% [markdown]
# Without `tracker.progress=none` there is a line for each round. Without `tracker.wandb.mode=disabled` there is an
# offline run of Weights & Biases too.
#
# ## Read
#
# `run.rows` has one dictionary for each round, with what is in `rounds.jsonl`.
# `fedray.Run(folder)` reads a run of another day.

# %%
rows = pandas.DataFrame(run.rows).set_index("round")
rows[["test/accuracy", "client/accuracy_mean", "model/sparsity", "wire/up_bytes", "wire/down_bytes"]].tail()

# %%
for name in ("test/accuracy", "model/sparsity", "wire/total_bytes", "wire/total_ratio", "digest"):
    print(f"{name:18} {run.final[name]}")

# %% [markdown]
# Sparsity is the fraction of weights that is removed. `wire/total_bytes` is all that was sent, both ways, each payload
# by its length; `wire/total_ratio` is how many times as much every parameter in four bytes would have been. Whoever has
# the same digest has the same weights and the same mask.
#
# ## Draw

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True, layout="constrained")
left.plot(rows.index, rows["test/accuracy"], label="test accuracy")
left.plot(rows.index, rows["model/sparsity"], "--", label="sparsity")
left.set(xlabel="round", ylim=(0, 1))
left.legend()
right.plot(rows["wire/total_bytes"] / 1e6, rows["test/accuracy"])
right.set(xlabel="MB sent so far, both ways", ylabel="test accuracy")
plt.show()

# %% [markdown]
# ## Where the megabytes went
#
# The command line is a function too. `reprice` counts a finished run again: by part, and as other papers count.

# %%
assert main(["reprice", str(run.folder)]) == 0

# %% [markdown]
# ## The model
#
# What is left is an ordinary `state_dict`, with zeros where weights were pruned.

# %%
for name, tensor in run.state_dict().items():
    print(f"{name:20} {tuple(tensor.shape)!s:12} {(tensor == 0).float().mean():.0%} zeros")

# %% [markdown]
# ## Next
#
# - [02_add_a_pruner](02_add_a_pruner.ipynb) writes, checks and runs a method of your own.
# - [03_compare_runs](03_compare_runs.ipynb) makes a table, figures and a page of many runs.
# - [docs/settings.md](../docs/settings.md) has data, models and methods, with a command for each.
