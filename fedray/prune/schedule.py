"""How sparse in which round: pure functions of the round, which counts from 1 (0 is before the first).

A schedule has events: rounds start, start + every, ... up to end, and end itself even where `every` does not
hit it. Between events the sparsity stays what the last event made it; at `end` it is exactly the final one.

one_shot:  one event, at start; `end` and `every` are not read.
linear:    s_0 + (s_f - s_0) t, with t from 0 at start to 1 at end.
cubic:     s_f + (s_0 - s_f) (1 - t)^3 (Zhu and Gupta 2017, equation 1).
iterative: event i of n keeps (1 - s_0) ((1 - s_f) / (1 - s_0))^(i / n), the same fraction of what is left each
           time (Frankle and Carbin 2019); i counts from 1, so that the first event prunes already.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Kind = Literal["one_shot", "linear", "cubic", "iterative"]
KINDS: tuple[str, ...] = get_args(Kind)


def is_event(round: int, *, kind: Kind, start: int, end: int, every: int) -> bool:
    """Whether the mask is chosen anew in this round."""
    if kind == "one_shot":
        return round == start
    return round == end or (start <= round < end and (round - start) % every == 0)


def sparsity_at(
    round: int, *, kind: Kind, sparsity: float, start: int, end: int, every: int, initial: float = 0.0
) -> float:
    """The fraction removed after this round.

    sparsity: the final fraction, in [0, 1). initial: the fraction before `start`.
    """
    if round < start:
        return initial
    if kind == "one_shot" or round >= end:
        return sparsity
    event = (round - start) // every
    passed = event * every / (end - start)
    match kind:
        case "linear":
            return initial + (sparsity - initial) * passed
        case "cubic":
            return sparsity + (initial - sparsity) * (1.0 - passed) ** 3
        case "iterative":
            events = -(-(end - start) // every) + 1
            kept: float = (1.0 - initial) * ((1.0 - sparsity) / (1.0 - initial)) ** ((event + 1) / events)
            return 1.0 - kept


def cosine(round: int, *, initial: float, end: int) -> float:
    """`initial / 2 * (1 + cos(pi * round / end))`, and 0 from `end` on (Evci et al. 2020, section 3).

    Not clamped, the cosine would rise again after `end`.
    """
    if round >= end:
        return 0.0
    return initial / 2.0 * (1.0 + math.cos(math.pi * round / end))
