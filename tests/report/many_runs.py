"""Run directories of a whole grid, written fast: the layout of `fedray.track.store` without its fsyncs."""

import json
import math
import random
from itertools import product

PRUNERS = ("rigl", "random", "magnitude", "snip", "feddst", "prunefl")
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
LAYERS = {"conv1.weight": 0.6, "conv2.weight": 0.9, "fc1.weight": 1.05, "fc2.weight": 0.8}


def write_grid(
    folder, *, pruners=PRUNERS, sparsities=SPARSITIES, alphas=ALPHAS, seeds=(0, 1, 2), rounds=100, every=1, clients=10
):
    """A run for each pruner, sparsity, alpha and seed; returns the folders."""
    cells = product(pruners, sparsities, alphas, seeds)
    return [
        write_one(
            folder / f"run-{at}", pruner=p, sparsity=s, alpha=a, seed=seed, rounds=rounds, every=every, clients=clients
        )
        for at, (p, s, a, seed) in enumerate(cells)
    ]  # fmt: skip


def write_one(
    folder, *, pruner="magnitude", sparsity=0.5, alpha=0.3, seed=0, rounds=5, every=1, clients=4, status="finished",
    error=None, log="the run starts\n", name="grid", overlap=True, **facts,
):  # fmt: skip
    """One run; its numbers follow from its settings and its seed."""
    folder.mkdir(parents=True)
    draw = random.Random(f"{pruner} {sparsity} {alpha} {seed}")
    pruned = pruner != "none"
    config = {
        "name": name, "seed": seed, "rounds": rounds, "eval": {"every": every}, "trainer": {"lr": 0.1},
        "partition": {"_target_": "fedray.data.Dirichlet", "alpha": alpha},
        "pruner": {"_target_": f"p.{pruner}", "sparsity": sparsity} if pruned else {},
        "data": {"_target_": "fedray.data.digits"},
    }  # fmt: skip
    manifest = {
        "run_id": f"{draw.getrandbits(64):016x}", "config": config,
        "choices": {"pruner": pruner, "partition": "dirichlet"},
        "environment": {
            "python": "3.11.7", "packages": {"torch": "2.13.0"}, "processor": "a processor", "cpus": 2,
            "platform": "Linux",
            "command": ["/src/fedray/__main__.py", f"pruner={pruner}", f"seed={seed}"],
        },
        "warnings": [], "status": status, "started": "2026-01-01T00:00:00+00:00", **facts,
    }  # fmt: skip
    if error is not None:
        manifest["error"] = error
    top = 0.95 - 0.25 * sparsity**4 * pruned - 0.1 / (1 + alpha) + draw.gauss(0, 0.004)
    sent = 1e6 * (1 - sparsity * pruned)
    rows, lines, total, seconds = [], [], {"up": 0, "down": 0}, 0.0
    for number in range(1, rounds + 1):
        now = sparsity * min(1.0, 2 * number / rounds) * pruned
        bytes_ = {"value": int(sent * (1 - now)), "mask": int(9000 * pruned), "header": 500}
        row = {"round": number, "train/loss": 2.3 * math.exp(-number / 20) + draw.random() / 50, "model/sparsity": now}
        if pruned:
            row |= {f"model/layer_sparsity/{one}": min(1.0, now * share) for one, share in LAYERS.items()}
            row |= {"prune/churn": 0.2 if number % 10 == 3 else 0.0, "prune/regrown": 0.0}
            if overlap:
                row["prune/overlap"] = 0.5 + 0.5 * number / rounds
        for way in ("up", "down"):
            row |= {f"wire/{way}_{part}_bytes": count for part, count in bytes_.items()}
            total[way] += sum(bytes_.values())
            row[f"wire/total_{way}_bytes"] = total[way]
        seconds += 0.5 + draw.random() / 10
        row |= {"wire/total_bytes": sum(total.values()), "wire/total_ratio": 2e6 * number / sum(total.values())}
        row |= {"time/total_s": seconds, "model/flops": 1e6 * (1 - now), "model/train_flops": 1e9 * number}
        if number % every == 0 or number == rounds:
            accuracy = min(1.0, top * (1 - math.exp(-number / (0.12 * rounds))) + draw.gauss(0, 0.003))
            row |= {"test/accuracy": accuracy, "test/loss": 2 * (1 - accuracy)}
            row |= {
                "client/accuracy_mean": accuracy,
                "client/accuracy_p10": accuracy - 0.1,
                "client/accuracy_p90": min(1.0, accuracy + 0.05),
            }
        rows.append(row)
        for client in range(clients):
            line = {"round": number, "client": client, "num_examples": 10, "sparsity": now}
            if "test/accuracy" in row:
                line["test/accuracy"] = max(0.0, min(1.0, draw.gauss(row["test/accuracy"], 0.06)))
            lines.append(line)
    for file, content in (("rounds.jsonl", rows), ("clients.jsonl", lines), ("transfers.jsonl", [])):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in content))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text("")
    if log is not None:
        (folder / "log.txt").write_text(log)
    return folder
