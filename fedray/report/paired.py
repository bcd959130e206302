"""Differences between settings, paired by seed: the same seed sees the same cohorts, batches and initial weights."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedray.errors import ConfigError
from fedray.report.results import Group, labels, sparsities
from fedray.report.settings import cell, closest, differing, resolve, same_value


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What a setting has more than its baseline, over the seeds that both have.

    pairs:     how many. mean, low, high: of the differences and of their t interval, which needs two pairs; None
               where there are too few.
    compared:  the values of the setting that were compared.
    itself:    it is the baseline.
    """

    pairs: int = 0
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    compared: tuple[float, ...] = ()
    itself: bool = False


class Baseline:
    """Which group others are compared with: for each the one that has the settings of `text` and is like it else.

    text: `KEY=VALUE` with commas between. Where KEY is a group of the configuration, as `pruner`, all its settings
    may differ; of several that are left, the one counts that shares those settings that both have.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        text: str,
        values: Callable[[Group], Mapping[int | None, float]],
        confidence: float,
    ) -> None:
        """Raises ConfigError where no group has these settings."""
        self.text = text
        self.notes: list[str] = []
        self._values, self._confidence = values, confidence
        known = list(dict.fromkeys(key for group in groups for key in group.settings))
        wanted: dict[str, str] = {}
        for item in text.split(","):
            key, equals, value = item.partition("=")
            if not equals or not key:
                raise ConfigError(f"--baseline has {item!r}; write KEY=VALUE, as in --baseline pruner=none")
            wanted[resolve(key, known, "--baseline")] = value
        fitting = list(groups)
        for key, value in wanted.items():
            fewer = [group for group in fitting if same_value(cell(group.settings, key), value)]
            if not fewer:
                there = list(dict.fromkeys(cell(group.settings, key) for group in fitting))
                raise ConfigError(f"--baseline {key}={value} is in no finished run; {closest(value, there)}")
            fitting = fewer
        self._candidates = fitting
        self._names = {id(group): label for group, label in zip(groups, labels(groups), strict=True)}
        self._free = [key for key in known if key in wanted or key.partition(".")[0] in wanted]
        self._fixed = [key for key in known if key not in self._free]
        # With a sparsity of its own in the baseline, everything is compared with that one.
        told = any(key.startswith("pruner.") and key.endswith("sparsity") for key in wanted)
        self._sparsity = {} if told else {id(g): at for g, at in zip(groups, sparsities(groups), strict=True)}
        self._partners = {id(group): self._partner(group) for group in groups}

    def difference(self, group: Group, seeds: Sequence[int | None] | None = None) -> Difference:
        """seeds: only these; None for all."""
        partner = self._partners[id(group)]
        if partner is None:
            return Difference()
        if partner is group:
            return Difference(itself=True)
        ours, theirs = self._values(group), self._values(partner)
        both = [seed for seed in ours if seed in theirs and (seeds is None or seed in seeds)]
        return difference([ours[seed] for seed in both], [theirs[seed] for seed in both], self._confidence)

    def _partner(self, group: Group) -> Group | None:
        found = self._like(group)
        if found is None:
            return None
        own, its = self._sparsity.get(id(group)), self._sparsity.get(id(found))
        if None not in (own, its) and own != its:
            self.notes.append(
                f"{self._names[id(group)]} has no baseline: none with {self.text} has its sparsity, {own}."
            )
            return None
        return found

    def _like(self, group: Group) -> Group | None:
        if any(group is candidate for candidate in self._candidates):
            alike = [group]
        else:
            alike = [one for one in self._candidates if not self._apart(group, one)]
        if len(alike) > 1:
            keys = [key for key in differing([one.settings for one in alike]) if key in group.settings]
            sharing = [one for one in alike if all(cell(one.settings, k) == cell(group.settings, k) for k in keys)]
            if keys and len(sharing) == 1:
                return sharing[0]
            apart = differing([one.settings for one in alike])
            more = f"{self.text},{apart[0]}={cell(alike[0].settings, apart[0])}"
            self.notes.append(
                f"{self._names[id(group)]} has no one baseline: {len(alike)} have {self.text} and differ in "
                f"{', '.join(apart)}; add one, as in --baseline {more}."
            )
            return None
        if not alike:
            apart = min((self._apart(group, one) for one in self._candidates), key=len)
            self.notes.append(
                f"{self._names[id(group)]} has no baseline: none with {self.text} is like it in {', '.join(apart)}."
            )
            return None
        return alike[0]

    def _apart(self, group: Group, other: Group) -> list[str]:
        return [key for key in self._fixed if cell(group.settings, key) != cell(other.settings, key)]


def difference(ours: Sequence[float], theirs: Sequence[float], confidence: float) -> Difference:
    """Ours minus theirs by pair, and the interval of its mean: that of scipy.stats.ttest_rel."""
    pairs = len(ours)
    if not pairs:
        return Difference()
    apart = [one - other for one, other in zip(ours, theirs, strict=True)]
    low = high = None
    if pairs > 1:
        from scipy import stats  # a second

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it has doubts about differences that are all the same
            interval = stats.ttest_rel(ours, theirs).confidence_interval(confidence)
        low, high = float(interval.low), float(interval.high)
    return Difference(pairs=pairs, mean=statistics.fmean(apart), low=low, high=high, compared=tuple(ours))
