"""The curves of the page as a still picture, for readers without JavaScript."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 860, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
COLOURS = 8
DASHES = ("", "7 4", "2 3", "9 3 2 3")


def still(charts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Lines, ticks and names of the headline metric by round, in the units of the picture; None without a curve.

    Means where all seeds have the round, as the page says of its curves. At most `charts["few"]` settings, the best of
    each method first.
    """
    metric = charts["headline"]
    having = [group for group in charts["groups"] if metric in group["series"] and metric in group["final"]]
    having.sort(key=lambda group: group["final"][metric][0], reverse=charts["rising"].get(metric, True))
    if len(having) > charts["few"]:
        firsts: dict[str, Mapping[str, Any]] = {}
        for group in having:
            firsts.setdefault(group["values"][charts["methodAt"]] if charts["methodAt"] >= 0 else "", group)
        having = list(firsts.values())[: charts["few"]]
    curves = [(group["label"], curve) for group in having if len(curve := _mean(group, metric)) > 1]
    if not curves:
        return None
    across = _ticks([x for _, curve in curves for x, _ in curve])
    up = _ticks([y for _, curve in curves for _, y in curve])

    def right(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (x - across[0]) / (across[-1] - across[0]), 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - up[0]) / (up[-1] - up[0]), 1)

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "middle": (WIDTH + LEFT - RIGHT) / 2,
        "metric": metric,
        "lines": [
            {
                "name": name,
                "colour": at % COLOURS,
                "dash": DASHES[at // COLOURS % len(DASHES)],
                "points": " ".join(f"{right(x)},{down(y)}" for x, y in curve),
            }
            for at, (name, curve) in enumerate(curves)
        ],
        "across": [(right(tick), f"{tick:g}") for tick in across],
        "up": [(down(tick), f"{tick:g}") for tick in up],
    }


def _mean(group: Mapping[str, Any], metric: str) -> list[tuple[float, float]]:
    number, *seeds = group["series"][metric]
    found = []
    for round_, *values in zip(group["grids"][number][0], *seeds, strict=True):
        kept = [value for value in values if value is not None]
        # Elsewhere the line would jump where a seed ends.
        if len(kept) == len(values):
            found.append((round_, statistics.fmean(kept)))
    return found


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, evenly spaced, from below the least to above the largest value."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * power for unit in (1, 2, 5, 10) if (high - low) / (unit * power) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(at * step, 12) for at in range(first, last + 1)]
