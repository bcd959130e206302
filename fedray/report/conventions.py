"""What a recorded transfer would have cost by the book-keeping of the literature.

A convention prices one row of transfers.jsonl, the share of one part in one payload: `row -> bytes`. With N = size
(coordinates of the part), n = params (values that travelled), d = n / N and b = bits of a value, all but `measured`
are formulas of these. Others can be added,
in a file conventions.py beside the user's own code, which `fedray reprice` imports (see `load_conventions`):

    from fedray.report.conventions import convention

    @convention()
    def mine(row):
        "Who counts so, and what is left out."
        return row["params"] * 2.0

Positions are charged where only some coordinates travelled; a part that travelled whole has none, and neither have the
factors of a low-rank stage. Frames and headers cost nothing, except under `measured`.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedray.errors import ConfigError

Row = Mapping[str, Any]
Way = Literal["down", "up"]
Price = Callable[[Row], float]
UNITS = {"MB": 1e6, "MiB": 2.0**20}
FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A way to count bytes.

    ways: the directions that it counts; the others cost nothing. unit: in which its users report.
    recorded: it reads the recorded bytes, so it needs a run. once: a client that catches up with several payloads at
    a time is charged for one.
    """

    name: str
    price: Price
    ways: tuple[Way, ...]
    unit: Literal["MB", "MiB"]
    recorded: bool
    once: bool

    def __call__(self, row: Row) -> float:
        """Bytes of a row of transfers.jsonl."""
        if row["direction"] not in self.ways:
            return 0.0
        if self.recorded:
            return self.price(row)
        if not row["size"]:
            return 0.0  # the frame, or a part of a model that has no such tensors
        payloads = row.get("payloads", 1)
        if payloads == 1:
            return self.price(row)
        # The row holds the sums of several payloads of the same layout; formulas are for one.
        share = {**row, "size": row["size"] // payloads}
        share |= {name: row[name] / payloads for name in ("kept", "params", "weights")}
        return self.price(share) * (1 if self.once else payloads)


CONVENTIONS: dict[str, Convention] = {}


def convention(
    *,
    ways: tuple[Way, ...] = ("down", "up"),
    unit: Literal["MB", "MiB"] = "MB",
    recorded: bool = False,
    once: bool = False,
) -> Callable[[Price], Price]:
    """Register a function under its own name; the fields are those of `Convention`."""

    def register(price: Price) -> Price:
        name = price.__name__
        if name in CONVENTIONS and price.__module__ != __name__ == CONVENTIONS[name].price.__module__:
            raise ConfigError(f"{name} is a convention of fedray's own; give yours another name")
        CONVENTIONS[name] = Convention(name=name, price=price, ways=ways, unit=unit, recorded=recorded, once=once)
        return price

    return register


def named(names: str | None) -> list[Convention]:
    """The conventions of a list with commas, all for None. Raises ConfigError for a name that is none."""
    if names is None:
        return list(CONVENTIONS.values())
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        if not name:
            raise ConfigError(
                f"--as {names!r} has an empty name; write names with commas between, as in --as values,bitmap, or "
                "leave --as out for all"
            )
        if name not in CONVENTIONS:
            near = difflib.get_close_matches(name, CONVENTIONS, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONVENTIONS)}"
            raise ConfigError(f"--as {name} is not a convention; {remedy}")
    return [CONVENTIONS[name] for name in wanted]


def load_conventions(folder: Path) -> None:
    """Import conventions.py of a folder, if there is one, once. Raises ConfigError if it cannot be imported."""
    path = Path(folder).resolve() / "conventions.py"
    module_name = f"fedray_conventions_of:{path}"  # runs of several folders may each have one
    if module_name in sys.modules or not path.is_file():
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, "a file that ends in .py has a spec"
    assert spec.loader is not None, "and a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(
            f"'{path}' cannot be imported ({type(error).__name__}: {error}); repair or move it"
        ) from error


# -- the conventions -------------------------------------------------------------------------------------------------


@convention(recorded=True)
def measured(row: Row) -> float:
    """What crossed fedray's wire: values, masks, positions, headers and frames, as recorded. Leaves nothing out."""
    return float(row["value_bytes"] + row["mask_bytes"] + row["header_bytes"])


@convention(once=True)
def dense(row: Row) -> float:
    """Every coordinate as float32, sent once: FedAvg, and what ratios are against. Leaves out pruning and coding."""
    return float(row["size"] * FLOAT_BITS / 8)


@convention()
def values(row: Row) -> float:
    """n b / 8: the receiver knows where they belong. Used by PruneFL, FedDST, HeteroFL; leaves out all positions."""
    return float(row["params"] * row["bits"] / 8)


@convention()
def coo32(row: Row) -> float:
    """n (b + 32) / 8: coordinates with int32 indices, as sparse tensors of most libraries have them."""
    return values(row) + (row["params"] * 32 / 8 if _positioned(row) else 0.0)


@convention()
def coo(row: Row) -> float:
    """n (b + ceil(log2 N)) / 8: coordinates with the narrowest fixed-width indices. Leaves out their padding."""
    return values(row) + (row["params"] * _width(row["size"]) / 8 if _positioned(row) else 0.0)


@convention()
def csr(row: Row) -> float:
    """[n (b + ceil(log2 c)) + (r + 1) ceil(log2(n + 1))] / 8: compressed sparse rows of an r x c matrix.

    Rows do not record the shapes of the tensors, so the part counts as one matrix as square as can be,
    c = ceil(sqrt(N)), r = ceil(N / c).
    """
    if not _positioned(row):
        return values(row)
    columns = math.isqrt(row["size"] - 1) + 1
    rows = -(-row["size"] // columns)
    bits = row["params"] * _width(columns) + (rows + 1) * math.ceil(math.log2(row["params"] + 1))
    return values(row) + float(bits) / 8


@convention()
def bitmap(row: Row) -> float:
    """ceil(N / 8) + n b / 8: a bit a coordinate. The tables of FedRTS (its sizes at sparsity 0.5, 0.7 and 0.8)."""
    return values(row) + (math.ceil(row["size"] / 8) if _positioned(row) else 0)


@convention()
def golomb(row: Row) -> float:
    """n (b + g + 1 / (1 - (1-d)^(2^g))) / 8, g = max(0, 1 + floor(log2(ln(phi - 1) / ln(1 - d)))): gaps in Golomb code.

    The expected length for positions at random (STC, Sattler et al. 2019); phi is the golden ratio.
    """
    if not _positioned(row) or not row["params"]:
        return values(row)
    gap = math.log1p(-row["params"] / row["size"])  # ln(1 - d)
    bits = max(0, 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / gap)))
    return values(row) + float(row["params"]) * (bits - 1 / math.expm1(gap * 2**bits)) / 8


@convention()
def entropy(row: Row) -> float:
    """(N H2(d) + n b) / 8: the least that positions at random cost on average (FedPM). A bound, no code."""
    if not _positioned(row) or not row["params"]:
        return values(row)
    d: float = row["params"] / row["size"]
    return values(row) - float(row["size"]) * (d * math.log2(d) + (1 - d) * math.log2(1 - d)) / 8


@convention(ways=("up",), unit="MiB")
def lotteryfl(row: Row) -> float:
    """Four bytes for each weight that was uploaded (LotteryFL, Li et al. 2021), in MiB, which the paper calls MB.

    Leaves out downloads, masks, and all tensors of one dimension (biases, norms).
    """
    return float(row["weights"] * FLOAT_BITS / 8)


@convention()
def fedrts(row: Row) -> float:
    """The ladder of FedRTS (appendix F.4): by density dense from 0.9, bitmap from 0.3, COO from 0.1, CSR below.

    The tables of that paper do not follow it: at density 0.2 they have the bitmap's size. Leaves out headers.
    """
    if not _positioned(row):
        return values(row)
    d: float = row["params"] / row["size"]
    if d >= 0.9:
        return float(row["size"] * row["bits"] / 8)
    return bitmap(row) if d >= 0.3 else coo(row) if d >= 0.1 else csr(row)


def _positioned(row: Row) -> bool:
    """Whether a receiver that knows nothing must be told where the values belong."""
    return row["params"] < row["size"] and "powersgd" not in row["chain"]


def _width(count: int) -> int:
    """Bits of a fixed-width index below `count`: ceil(log2(count))."""
    return (count - 1).bit_length()
