"""A local round of `mnist_cnn` on physically smaller models beside the whole one, as ratios of their times.

    scripts/bench_structured                 structured, heterofl, fjord; five pairs each
    scripts/bench_structured --pairs 15 --only structured

One client of 600 grey images of 28x28, batches of 20, one epoch, plain SGD: 30 steps of the CNN of McMahan et al. 2017
in one process on one thread. Pixels are random, which takes as long as digits. What is timed is the whole call that
turns a job into a fit, with cutting out the smaller model's weights and putting them back. Rounds of the smaller and of
the whole model alternate; the ratio of each pair is taken, its median and quartiles printed. The first round of each
size, which builds the smaller model, comes before and is printed apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from fedray.costs import forward_flops, masked_flops
from fedray.keys import Key
from fedray.models import McMahanCNN, Task
from fedray.models.structure import find_structure
from fedray.prune.widths import window
from fedray.round import Job, Message, Optim
from fedray.train import Engine, Samples

SHAPE, CLASSES, EXAMPLES, BATCH = (1, 28, 28), 10, 600, 20
REQUIRED = {("structured", 0.5): 0.55, ("structured", 0.25): 0.35}
WIDTHS = {"structured": (0.5, 0.25), "heterofl": (1.0, 0.5, 0.25, 0.125, 0.0625), "fjord": (1.0, 0.8, 0.6, 0.4, 0.2)}


def pairs_of(small: Callable[[], None], whole: Callable[[], None], count: int) -> list[float]:
    """Ratios of the times of `count` alternating pairs."""
    found = []
    for _ in range(count):
        seconds = []
        for run in (whole, small):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        found.append(seconds[1] / seconds[0])
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=5, help="of rounds for each row")
    options.add_argument("--only", choices=list(WIDTHS), help="one part")
    given = options.parse_args()
    torch.set_num_threads(1)
    task = Task(build=partial(McMahanCNN, shape=SHAPE, num_classes=CLASSES))
    module, sample = task.module(Key.of(0)), torch.zeros(1, *SHAPE)
    started = time.perf_counter()
    structure = find_structure(module, sample)
    print(f"units found in {time.perf_counter() - started:.2f} s", file=sys.stderr)
    engine = Engine(task, key=Key.of(0), sample_shape=SHAPE, device="cpu", kind="auto", structure=structure)
    flops = forward_flops(module, sample)
    x = torch.randint(0, 256, (EXAMPLES, *SHAPE), dtype=torch.uint8, generator=Key.of(1).torch())
    y = torch.arange(EXAMPLES) % CLASSES
    data = Samples(x, y, torch.arange(EXAMPLES), torch.tensor([0.1307]), torch.tensor([0.3081]), 1 / 255)
    params, buffers, _, _ = engine.origin()
    steps = EXAMPLES // BATCH
    dense = Job(params=params, buffers=buffers, mask=None, num_steps=steps, batch_size=BATCH, lr=0.1, optim=Optim())

    def train(job: Job) -> None:
        engine.fit(job, Message(), data, Key.of(2))

    train(dense)
    print("| what | width | parameters | FLOPs | time, median (quartiles) of dense | limit | first round, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    missed = 0
    for part in [given.only] if given.only else WIDTHS:
        for rate in WIDTHS[part]:
            mask = structure.mask(window(structure, rate))
            job = replace(dense, mask=mask, shrink=True)
            if part == "heterofl":
                job = replace(job, scaler=rate)
            if part == "fjord":
                rates = [other for other in reversed(WIDTHS[part]) if other <= rate]
                job = replace(job, submodels=tuple(structure.mask(window(structure, r)) for r in rates))
            started = time.perf_counter()
            train(job)
            first = time.perf_counter() - started
            ratios = pairs_of(partial(train, job), partial(train, dense), given.pairs)
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            limit = REQUIRED.get((part, rate))
            missed += limit is not None and middle > limit
            share = masked_flops(flops, mask) / sum(flops.values())
            print(
                f"| {part} | {rate:g} | {int(mask.flat.sum()):,} | {share:.3f} "
                f"| {middle:.3f} ({low:.3f} to {high:.3f}) | {'' if limit is None else limit} | {first:.1f} |",
                flush=True,
            )
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
