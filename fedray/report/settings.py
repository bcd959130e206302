"""The settings of runs, flattened, and which of them tell the runs apart."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from fedray.errors import ConfigError
from fedray.report.runs import flattened

IGNORED = ("name", "seed", "runtime", "tracker", "checkpoint", "experiment", "sweep")
"""Settings that do not change a result, and the seed; locations (every `path`) are ignored too."""
ABSENT = "-"
LISTED = 8

Settings = Mapping[str, Any]


def settings_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was told to do by dotted key, without what is ignored."""
    config = manifest["config"]
    settings = {
        key: value
        for key, value in flattened({key: config[key] for key in config if key not in IGNORED}).items()
        if key.rsplit(".", 1)[-1] != "path"
    }
    # What was chosen of each group names it better than the sum of its settings; those that differ within it follow.
    choices = {group: choice for group, choice in manifest.get("choices", {}).items() if group not in IGNORED}
    settings = choices | settings | choices
    for group in choices:
        node = config.get(group)
        if isinstance(node, Mapping) and "_target_" in node:
            # A choice may have been given another component to make, as in pruner=feddst pruner._target_=mine.Own.
            settings[f"{group}._target_"] = str(node["_target_"])
    if "data" in manifest:
        settings["data.digest"] = manifest["data"]["digest"]  # the same location may have held other data
    return settings


def differing(several: Sequence[Settings]) -> list[str]:
    """Keys that tell the settings apart, in the order of the configuration.

    The settings of a component count where they differ between runs that have the same component, and made the
    same choice of its group: another pruner or wire is one difference, not one for each of its settings. Keys are
    added until no two look alike.
    """
    keys = list(dict.fromkeys(key for settings in several for key in settings))
    chosen = set()
    for key in keys:
        found: dict[tuple[str, str], set[str]] = defaultdict(set)
        for settings in several:
            if key in settings:
                same = (cell(settings, key.partition(".")[0]), cell(settings, key.rpartition(".")[0]))
                found[same if "." in key else ("", "")].add(cell(settings, key))
        if any(len(cells) > 1 for cells in found.values()):
            chosen.add(key)
    looks = [tuple(cell(settings, key) for key in keys if key in chosen) for settings in several]
    for key in keys:
        alike: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for settings, look in zip(several, looks, strict=True):
            alike[look].add(cell(settings, key))
        if any(len(cells) > 1 for cells in alike.values()):
            chosen.add(key)
            looks = [(*look, cell(settings, key)) for settings, look in zip(several, looks, strict=True)]
    return [key for key in keys if key in chosen]


def short(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last name where no other key ends in it, else the key."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def cell(settings: Settings, key: str) -> str:
    return str(settings[key]) if key in settings else ABSENT


def order(value: Any) -> tuple[int, float, str]:
    """Absent first, then numbers by size, then words."""
    if value is None:
        return (0, 0.0, "")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (1, value, "")
    return (2, 0.0, str(value))


def closest(name: str, names: Sequence[str]) -> str:
    """What to write instead of a name that is none of `names`, which come with the most useful first."""
    last = {known.rsplit(".", 1)[-1]: known for known in names}
    near = difflib.get_close_matches(name, [*names, *last], n=1)
    if near:
        return f"did you mean {last.get(near[0], near[0])}?"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"there are {', '.join(names[:LISTED])}{more}"


def resolve(key: str, keys: Sequence[str], option: str) -> str:
    """A setting from its full or short name. Raises ConfigError where it is none, or may be several."""
    found = [key] if key in keys else [known for known in keys if known.endswith(f".{key}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{option} {key} may be {' or '.join(found)}; write one of them in full")
    raise ConfigError(f"{option} {key} is not a setting of these runs; {closest(key, keys)}")


def same_value(shown: str, typed: str) -> bool:
    """Whether a value is the one that somebody typed: 0.50 is 0.5."""
    if shown == typed:
        return True
    try:
        return float(shown) == float(typed)
    except ValueError:
        return shown.lower() == typed.lower()


class _HasSettings(Protocol):
    @property
    def settings(self) -> Settings: ...


Chosen = TypeVar("Chosen", bound=_HasSettings)


def only(several: Sequence[Chosen], conditions: Sequence[str]) -> list[Chosen]:
    """Those that meet every `KEY=VALUE` or `KEY=VALUE|VALUE`. Raises ConfigError where none does."""
    kept = list(several)
    for condition in conditions:
        key, equals, values = condition.partition("=")
        if not equals or not key:
            raise ConfigError(f"--only is {condition!r}; write KEY=VALUE, as in --only pruner.sparsity=0.9")
        told = [{**one.settings, "seed": one.seed} if hasattr(one, "seed") else one.settings for one in kept]
        full = resolve(key, list(dict.fromkeys(key for settings in told for key in settings)), "--only")
        wanted = values.split("|")
        shown = [cell(settings, full) for settings in told]
        there = list(dict.fromkeys(shown))
        fits = [any(same_value(look, value) for value in wanted) for look in shown]
        if not any(fits):
            raise ConfigError(f"--only {key}={values} is in none of these runs; {closest(values, there)}")
        # What cannot be judged stays: a run that nobody can read, a cell of which only its overrides are known.
        unknown = [
            not getattr(one, "manifest", True) and full not in settings
            for one, settings in zip(kept, told, strict=True)
        ]
        kept = [one for one, fit, dark in zip(kept, fits, unknown, strict=True) if fit or dark]
    return kept
