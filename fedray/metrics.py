"""What the name of a metric says, for runs that are to reach a value of it and for tables alike."""

from __future__ import annotations

import re

SMALLER_IS_BETTER = frozenset(
    "loss mse mae rmse perplexity error regret nll ece brier entropy wer cer bits dead".split()
)
"""Words in the name of a metric that gets better as it falls."""


def rises(metric: str) -> bool:
    """Whether more of a metric is better, by the words of its last name: "test/top5_error" has one of those above."""
    return SMALLER_IS_BETTER.isdisjoint(re.split(r"[_\W\d]+", metric.rpartition("/")[2].lower()))
