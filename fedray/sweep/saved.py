"""Sweeps that are kept as a file, `conf/sweep/NAME.yaml`: which cells there are, as overrides of the configuration.

    base: [+experiment=quickstart, rounds=20]      what all cells share
    grid:                                          every combination of the values
      pruner: [magnitude, feddst]
      pruner.sparsity: [0.5, 0.9]
    zip:                                           values side by side: the first of each, the second of each ...
      partition.alpha: [0.1, 1.0]
      trainer.lr: [0.05, 0.1]
    random:                                        cells drawn from choices and ranges
      samples: 20
      seed: 0
      values:
        trainer.lr: {low: 0.001, high: 1.0, log: true}
        cohort: {low: 2, high: 10, integer: true}
    seeds: 3                                       seed=0,1,2; or a list
    filters: ["not (pruner == 'feddst' and pruner.sparsity > 0.8)"]     a cell stays where all of them hold

Blocks multiply: each cell of the grid with each of zip, of random and of seeds. A zip can be a list of rows too, and a
row sets only what belongs to it: [{pruner: none}, {pruner: feddst, pruner.sparsity: 0.9}].
"""

from __future__ import annotations

import ast
import difflib
import itertools
import math
import operator
import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedray.errors import ConfigError

BLOCKS = ("base", "grid", "zip", "random", "seeds", "filters")
DIGITS = 4
"""Significant digits of a value that is drawn from a range: an override is also a label and a folder's name."""
MOST_CELLS = 100_000
"""Of a sweep, before its filters: each is composed and held in memory, and more are a slip of the pen."""
MOST_NESTED = 50
"""How deep a filter may be: it is read by recursion, and Python's stack has an end."""
FARTHEST = 1e300
"""The largest number of a range: the difference of two of these is still a number."""

_KEY = re.compile(r"(\+\+?)?[A-Za-z_][\w]*([./@:-][\w]+)*")
_PLAIN = re.compile(r"[A-Za-z0-9_./:+\-]*[A-Za-z0-9_./]")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from low to high, both included. log: equally likely per factor, not per difference. integer: whole."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def draw(self, share: float) -> float | int:
        """The number at that share of the range, from 0 to 1, rounded to DIGITS significant digits."""
        if self.integer:
            low, high = self.low - 0.5, self.high + 0.5
            if self.log:
                found = math.exp(math.log(self.low) + share * (math.log(self.high + 1) - math.log(self.low)))
                return min(int(found), int(self.high))
            return min(max(round(low + share * (high - low)), int(self.low)), int(self.high))
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Cells that are drawn. values: by key, a tuple of choices or a range.

    A value follows from the seed, its key and the number of its sample alone: more samples begin with the same ones,
    and one more key leaves the others as they were.
    """

    samples: int
    seed: int
    values: Mapping[str, tuple[Any, ...] | Range]

    def rows(self) -> list[dict[str, Any]]:
        return [{key: self._draw(key, index) for key in self.values} for index in range(self.samples)]

    def _draw(self, key: str, index: int) -> Any:
        share = random.Random(f"{self.seed}/{index}/{key.lstrip('+')}").random()
        choices = self.values[key]
        return choices.draw(share) if isinstance(choices, Range) else choices[int(share * len(choices))]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A saved sweep. base: overrides as text. grid: values by key. zipped: rows of values by key. seeds: as many as
    were asked for are not built before they have been counted."""

    name: str
    base: tuple[str, ...]
    grid: Mapping[str, tuple[Any, ...]]
    zipped: tuple[Mapping[str, Any], ...]
    draws: Draws | None
    seeds: Sequence[int]
    filters: tuple[Filter, ...]

    def blocks(self) -> dict[str, set[str]]:
        """The keys that each block sets, without their signs."""
        return {
            "base": {bare(text.split("=", 1)[0]) for text in self.base},
            "grid": set(map(bare, self.grid)),
            "zip": {bare(key) for row in self.zipped for key in row},
            "random": set(map(bare, self.draws.values)) if self.draws is not None else set(),
            "seeds": {"seed"} if self.seeds else set(),
        }

    def keys(self) -> set[str]:
        """All that the file sets."""
        return set().union(*self.blocks().values())


@dataclass(frozen=True, kw_only=True)
class Given:
    """An override of the command line. key: with its + or ~. values, texts: of all its alternatives, one or more, as
    plain values and as Hydra writes them."""

    key: str
    values: tuple[Any, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """The cells of a sweep, each as its overrides, with those that all share in front. dropped: cells that a filter
    took out. repeated: cells that were the same as an earlier one."""

    cells: tuple[tuple[str, ...], ...]
    dropped: int
    repeated: int


def read_saved(name: str, node: Any) -> Saved:
    """The sweep that a file holds. node: what its YAML says, as plain values. Raises ConfigError."""
    where = f"sweep {name}"
    if not isinstance(node, Mapping) or not node:
        raise ConfigError(f"{where} is {node!r}; it holds blocks: {', '.join(BLOCKS)}")
    for key in node:
        if key not in BLOCKS:
            raise ConfigError(f"{where}: {key} is no block; {_closest(str(key), BLOCKS)}")
    base = _overrides(where, node["base"]) if "base" in node else ()
    grid = _grid(where, node["grid"]) if "grid" in node else {}
    zipped = _zip(where, node["zip"]) if "zip" in node else ()
    draws = _draws(where, node["random"]) if "random" in node else None
    seeds = _seeds(where, node["seeds"]) if "seeds" in node else ()
    texts = node["filters"] if "filters" in node else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f'{where}: filters is {texts!r}; write a list of conditions, as in ["cohort < 10"]')
    saved = Saved(
        name=name,
        base=base,
        grid=grid,
        zipped=zipped,
        draws=draws,
        seeds=seeds,
        filters=tuple(Filter.of(where, text) for text in texts),
    )
    blocks = saved.blocks()
    for (one, of_one), (other, of_other) in itertools.combinations(blocks.items(), 2):
        for key in sorted(of_one & of_other):
            raise ConfigError(f"{where}: {key} stands in {one} and in {other}; one block sets a key: take one out")
    if not any(keys for block, keys in blocks.items() if block != "base"):
        raise ConfigError(f"{where} has no cells; it needs one of grid, zip, random and seeds")
    return saved


def plain_product() -> Saved:
    """The sweep of a command without a saved one: every combination of the values that it gives."""
    return Saved(name="", base=(), grid={}, zipped=(), draws=None, seeds=(), filters=())


def merged(base: Sequence[str], given: Sequence[str]) -> list[str]:
    """The overrides of a sweep before those of the command line, less what these set anew."""
    anew = {bare(text.split("=", 1)[0]) for text in given}
    return [*(text for text in base if bare(text.split("=", 1)[0]) not in anew), *given]


def expand(saved: Saved, given: Sequence[Given]) -> Expansion:
    """The cells of a saved sweep under the overrides of a command.

    An override of a key of the grid, or of the seed, takes the place of its values there; one with several values of
    its own is a further axis; any other is shared by all cells. Raises ConfigError.
    """
    where = f"sweep {saved.name}"
    grid: dict[str, list[tuple[Any, str]]] = {
        key: [(value, override(key, value)) for value in values] for key, values in saved.grid.items()
    }
    given_seeds: list[tuple[Any, str]] | None = None
    fixed = {key: block for block in ("zip", "random") for key in saved.blocks()[block]}
    shared: list[str] = []
    facts: dict[str, Any] = {}
    for one in given:
        key = bare(one.key)
        alternatives = [(value, f"{one.key}={text}") for value, text in zip(one.values, one.texts, strict=True)]
        if key in fixed:
            raise ConfigError(
                f"{where}: {key} is set by its {fixed[key]} block; change conf/sweep/{saved.name}.yaml, or a copy of "
                "it, and leave it out of the command"
            )
        if key == "seed" and saved.seeds:
            given_seeds = alternatives
        elif any(bare(own) == key for own in grid):
            grid = {
                (one.key if bare(own) == key else own): (alternatives if bare(own) == key else values)
                for own, values in grid.items()
            }
        elif len(alternatives) > 1:
            grid[one.key] = alternatives
        else:
            shared.append(alternatives[0][1])
            facts[key] = alternatives[0][0]
    _check_size(saved, {key: len(values) for key, values in grid.items()}, len(given_seeds or saved.seeds))
    rows = saved.draws.rows() if saved.draws is not None else [{}]
    seeds = given_seeds or [(seed, override("seed", seed)) for seed in saved.seeds]
    axes: list[list[tuple[dict[str, Any], tuple[str, ...]]]] = [
        [({bare(key): value}, (text,)) for value, text in values] for key, values in grid.items()
    ]
    for block in (saved.zipped or ({},), rows):
        axes.append(
            [
                ({bare(key): value for key, value in row.items()}, tuple(override(key, v) for key, v in row.items()))
                for row in block
            ]
        )
    if seeds:
        axes.append([({"seed": seed}, (text,)) for seed, text in seeds])
    known = {*facts, *(key for axis in axes for names, _ in axis for key in names)}
    for condition in saved.filters:
        condition.check(where, known)
    found: dict[tuple[str, ...], None] = {}
    dropped = repeated = 0
    for combination in itertools.product(*axes):
        names: dict[str, Any] = dict(facts)
        texts: list[str] = list(shared)
        for its_names, its_texts in combination:
            names |= its_names
            texts += its_texts
        if not all(condition.holds(where, names) for condition in saved.filters):
            dropped += 1
        elif tuple(texts) in found:
            repeated += 1
        else:
            found[tuple(texts)] = None
    if not found:
        raise ConfigError(f"{where} has no cell left; its filters drop all {dropped}: loosen one of them")
    return Expansion(cells=tuple(found), dropped=dropped, repeated=repeated)


def _check_size(saved: Saved, lengths: Mapping[str, int], seeds: int) -> None:
    """Refuse a product of too many cells before it is built. lengths: of the grid's axes, with the command's."""
    own = saved.blocks()["grid"]
    sizes = {
        "grid": math.prod(length for key, length in lengths.items() if bare(key) in own),
        "zip": len(saved.zipped),
        "random": saved.draws.samples if saved.draws is not None else 0,
        "seeds": seeds,
        "the command": math.prod(length for key, length in lengths.items() if bare(key) not in own),
    }
    sizes = {block: size for block, size in sizes.items() if size > 1}
    if math.prod(sizes.values()) > MOST_CELLS:
        told = ", ".join(f"{block} has {size:,}" for block, size in sizes.items())
        raise ConfigError(
            f"{f'sweep {saved.name}' if saved.name else 'the sweep'} would have {math.prod(sizes.values()):,} cells "
            f"({told}); it takes at most {MOST_CELLS:,}: give fewer values"
        )


def bare(key: str) -> str:
    """A key without the sign that adds or deletes it."""
    return key.lstrip("+~")


def override(key: str, value: Any) -> str:
    """`key=value` as Hydra's grammar reads it."""
    return f"{key}={_text(value)}"


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # What would be read as another type, or has a character of the grammar, goes in quotes.
        if _PLAIN.fullmatch(value) and not _is_other(value):
            return value
        escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
        escaped = re.sub(r"(\\+)$", lambda found: found[1] * 2, escaped)
        return f"'{escaped}'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_text(inner)}" for key, inner in value.items()) + "}"
    return "[" + ",".join(_text(inner) for inner in value) + "]"


def _is_other(text: str) -> bool:
    """Whether Hydra reads this as a number, a boolean or null."""
    try:
        float(text.replace("_", ""))
    except ValueError:
        return text.lower() in ("true", "false", "null")
    return True


# -- filters -----------------------------------------------------------------------------------------------------------

COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}
GRAMMAR = "it takes keys, numbers, 'text' in quotes, lists, == != < <= > >= in, and, or, not and brackets"


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A condition on the overrides of a cell. It is read as a tree of comparisons and never run as code."""

    text: str
    tree: ast.expr

    @classmethod
    def of(cls, where: str, text: str) -> Filter:
        """Raises ConfigError for anything but comparisons of keys and plain values."""
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise ConfigError(f"{where}: the filter {text!r} cannot be read; {GRAMMAR}") from None
        depth = _depth(tree)
        if depth > MOST_NESTED:
            raise ConfigError(
                f"{where}: the filter {text[:40]!r}... is nested {depth} deep; at most {MOST_NESTED}: make several"
            )
        found = cls(text=text, tree=tree)
        found._visit(where, tree, truth=True)
        return found

    def check(self, where: str, known: set[str]) -> None:
        """Refuse a key that no cell sets."""
        for key in sorted(self._keys(self.tree)):
            if key not in known:
                raise ConfigError(
                    f"{where}: the filter {self.text!r} names {key}, which no cell sets; "
                    f"{_closest(key, sorted(known))}, and text goes in quotes"
                )

    def holds(self, where: str, names: Mapping[str, Any]) -> bool:
        """Whether a cell with these values stays. A comparison with a key that the cell does not set is false."""
        return self._truth(where, self.tree, names)

    def _visit(self, where: str, node: ast.expr, *, truth: bool) -> None:
        """truth: whether a condition stands here, or a value."""
        if isinstance(node, ast.BoolOp) and truth:
            for part in node.values:
                self._visit(where, part, truth=True)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) and truth:
            self._visit(where, node.operand, truth=True)
        elif isinstance(node, ast.Compare) and truth:
            self._visit(where, node.left, truth=False)
            for op, side in zip(node.ops, node.comparators, strict=True):
                if type(op) not in COMPARISONS:
                    raise self._unreadable(where)
                if not isinstance(op, ast.In | ast.NotIn):
                    self._visit(where, side, truth=False)
                elif len(node.ops) == 1 and isinstance(side, ast.List | ast.Tuple):
                    for value in side.elts:
                        self._visit(where, value, truth=False)
                else:
                    raise self._unreadable(where)
        elif isinstance(node, ast.Name | ast.Attribute) and _dotted(node) is not None:
            pass  # a value, or a key that is true or false
        elif not truth and _constant(node) is not None:
            pass
        else:
            raise self._unreadable(where)

    def _unreadable(self, where: str) -> ConfigError:
        return ConfigError(f"{where}: the filter {self.text!r} cannot be read; {GRAMMAR}")

    def _keys(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Name | ast.Attribute):
            dotted = _dotted(node)
            return {dotted} - set(WORDS) if dotted is not None else set()
        return {key for child in ast.iter_child_nodes(node) for key in self._keys(child)}

    def _truth(self, where: str, node: ast.expr, names: Mapping[str, Any]) -> bool:
        if isinstance(node, ast.BoolOp):
            answers = (self._truth(where, part, names) for part in node.values)
            return all(answers) if isinstance(node.op, ast.And) else any(answers)
        if isinstance(node, ast.UnaryOp):
            return not self._truth(where, node.operand, names)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            return all(
                self._compare(where, op, one, other, names)
                for op, one, other in zip(node.ops, sides, sides[1:], strict=False)
            )
        return self._value(node, names) is True

    def _compare(self, where: str, op: ast.cmpop, one: ast.expr, other: ast.expr, names: Mapping[str, Any]) -> bool:
        left = self._value(one, names)
        many = isinstance(op, ast.In | ast.NotIn) and isinstance(other, ast.List | ast.Tuple)
        sides = other.elts if isinstance(other, ast.List | ast.Tuple) else [other]
        found = [self._value(side, names) for side in sides]
        if left is _UNSET or any(value is _UNSET for value in found):
            return isinstance(op, ast.NotEq | ast.NotIn)
        right: Any = found if many else found[0]
        try:
            return bool(COMPARISONS[type(op)](left, right))
        except TypeError:
            raise ConfigError(
                f"{where}: the filter {self.text!r} compares {left!r} with {right!r}; compare numbers with numbers"
            ) from None

    def _value(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        constant = _constant(node)
        if constant is not None:
            return constant[0]
        key = _dotted(node)
        assert key is not None
        return names.get(key, _UNSET)


_UNSET = object()
WORDS: Mapping[str, Any] = {"true": True, "false": False, "null": None}


def _depth(tree: ast.AST) -> int:
    """Of the tree; without recursion, for which it may be too deep."""
    depth, level = 0, [tree]
    while level:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def _constant(node: ast.expr) -> tuple[Any] | None:
    """A plain value, in a tuple so that null is one; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
        return (node.value,)
    if isinstance(node, ast.Name) and node.id in WORDS:
        return (WORDS[node.id],)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _constant(node.operand)
        if inner is not None and isinstance(inner[0], int | float) and not isinstance(inner[0], bool):
            return (-inner[0],)
    return None


# -- the blocks --------------------------------------------------------------------------------------------------------


def _overrides(where: str, node: Any) -> tuple[str, ...]:
    if not isinstance(node, list) or not all(isinstance(text, str) and "=" in text for text in node):
        raise ConfigError(f"{where}: base is {node!r}; write a list of overrides, as in [+experiment=quickstart]")
    _checked_keys(where, "base", [text.split("=", 1)[0] for text in node])
    return tuple(node)


def _grid(where: str, node: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(node, Mapping) or not node:
        raise ConfigError(f"{where}: grid is {node!r}; write values by key, as in pruner.sparsity: [0.5, 0.9]")
    _checked_keys(where, "grid", node)
    return {key: _values(where, f"grid.{key}", values) for key, values in node.items()}


def _zip(where: str, node: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(node, list) and node and all(isinstance(row, Mapping) and row for row in node):
        for row in node:
            _checked_keys(where, "zip", row)
        return tuple({key: _plain_value(where, f"zip.{key}", value) for key, value in row.items()} for row in node)
    if not isinstance(node, Mapping) or not node:
        raise ConfigError(f"{where}: zip is {node!r}; write lists of one length by key, or a list of rows")
    _checked_keys(where, "zip", node)
    columns = {key: _values(where, f"zip.{key}", values) for key, values in node.items()}
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ConfigError(f"{where}: the lists of zip must have one length, but {told}; fill them up, or write rows")
    return tuple(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _draws(where: str, node: Any) -> Draws:
    names = ("samples", "seed", "values")
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where}: random is {node!r}; it holds {', '.join(names)}")
    for key in node:
        if key not in names:
            raise ConfigError(f"{where}: random.{key} is not a setting; {_closest(str(key), names)}")
    for key in names:
        if key not in node:
            raise ConfigError(f"{where}: random.{key} is not set; random needs {', '.join(names)}")
    samples, seed, values = node["samples"], node["seed"], node["values"]
    if not _is_int(samples) or samples < 1:
        raise ConfigError(f"{where}: random.samples is {samples!r}; it must be a whole number, at least 1")
    if not _is_int(seed):
        raise ConfigError(f"{where}: random.seed is {seed!r}; it must be a whole number")
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(f"{where}: random.values is {values!r}; write lists or ranges by key")
    _checked_keys(where, "random", values)
    return Draws(
        samples=samples,
        seed=seed,
        values={
            key: _range(where, f"random.values.{key}", value)
            if isinstance(value, Mapping)
            else _values(where, f"random.values.{key}", value)
            for key, value in values.items()
        },
    )


def _range(where: str, name: str, node: Mapping[str, Any]) -> Range:
    fields = ("low", "high", "log", "integer")
    for key in node:
        if key not in fields:
            raise ConfigError(f"{where}: {name}.{key} is not a setting; {_closest(str(key), fields)}")
    for key in ("low", "high"):
        value = node[key] if key in node else None
        # math.isfinite raises for whole numbers beyond all floats.
        if isinstance(value, bool) or not isinstance(value, int | float) or not -FARTHEST <= value <= FARTHEST:
            raise ConfigError(
                f"{where}: {name}.{key} is {_short(value)}; a range needs low and high, both finite and at most "
                f"{FARTHEST:g}"
            )
    for key in ("log", "integer"):
        if key in node and not isinstance(node[key], bool):
            raise ConfigError(f"{where}: {name}.{key} is {node[key]!r}; write true or false")
    found = Range(**node)
    if not found.low < found.high:
        raise ConfigError(f"{where}: {name} goes from {found.low} to {found.high}; low must be below high")
    if found.log and found.low <= 0:
        raise ConfigError(f"{where}: {name}.low is {found.low}; with log it must be above 0")
    if found.integer and not (_is_int(found.low) and _is_int(found.high)):
        raise ConfigError(f"{where}: {name} goes from {found.low} to {found.high}; with integer both must be whole")
    return found


def _seeds(where: str, node: Any) -> Sequence[int]:
    if _is_int(node) and node >= 1:
        return range(min(node, sys.maxsize))  # len() goes no further; so many are refused
    good = isinstance(node, list) and node and all(_is_int(seed) and seed >= 0 for seed in node)
    if not good or len(set(node)) != len(node):
        raise ConfigError(f"{where}: seeds is {node!r}; write how many, as in 3, or a list of different ones")
    return tuple(node)


def _values(where: str, name: str, node: Any) -> tuple[Any, ...]:
    if not isinstance(node, list) or not node:
        raise ConfigError(f"{where}: {name} is {node!r}; write a list of values, as in [0.5, 0.9]")
    return tuple(_plain_value(where, name, value) for value in node)


def _plain_value(where: str, name: str, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {name} holds {value!r}; write finite numbers")
    if not isinstance(value, bool | int | float | str | list | Mapping | None):
        raise ConfigError(f"{where}: {name} holds {value!r}; write numbers, text, true, false, null, or lists of these")
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _plain_value(where, name, inner)
    return value


def _checked_keys(where: str, block: str, keys: Iterable[Any]) -> None:
    """Refuse what is no key, what no cell can set, and the same key twice."""
    seen: dict[str, str] = {}
    for key in keys:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ConfigError(
                f"{where}: {block} names {key!r}; a key is written as on the command line, pruner.sparsity"
            )
        if re.split(r"[./@:]", bare(key), maxsplit=1)[0] in ("hydra", "sweep"):
            # These are about the sweep as a whole, and have no effect in a cell.
            raise ConfigError(f"{where}: {block} has {key!r}; that belongs on the command line")
        if bare(key) in seen:
            raise ConfigError(f"{where}: {block} has {seen[bare(key)]} and {key}, which are one key; put it there once")
        seen[bare(key)] = key


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _closest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(words)}"
