"""A partition in words and in pictures: who has how much of what. Reads a manifest and nothing else.

A manifest is what `fedray.data.manifest` returns: hash, num_clients, num_samples and the histogram, samples by client
and class. Up to `FEW` clients are shown one by one; more of them as a heat map over clients sorted by dominant class,
with a histogram of sizes. Every function returns something to print, or writes the file that it is told to.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedray.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from rich.text import Text

FEW = 40
"""Clients that get a row each."""

FEW_CLASSES = 20
"""Classes that get a colour each; beyond, a heat map has them in columns."""

FORMATS = (".png", ".pdf", ".svg")
HEAT_ROWS = 32
SIZE_BINS = 12
_PLAIN_WIDTH = 100  # columns where the output is no terminal
_BAR_WIDTH = 24
_WIDE_RANGE = 50  # ratio of the largest to the smallest size from which size bins are logarithmic
_HEADROOM = 3  # the darkest shade is at least so many times an even share, so that chance does not look like skew
_SYMBOLS = "0123456789abcdefghij"
_SHADES = " ░▒▓█"
_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
    "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#c7c7c7", "#dbdb8d", "#9edae5",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """What `partition_command` shows. num_available: training samples there are, dealt out or not."""

    manifest: Mapping[str, Any]
    num_available: int
    title: str


def partition_command(
    arguments: Sequence[str],
    *,
    parser: type[argparse.ArgumentParser],
    deal: Callable[[Sequence[str], str | None], Dealt],
) -> None:
    """Print the partition of an experiment in words and as a picture, and write it to files.

    deal: from overrides and the folder of the user's own code; no model is built. Raises ConfigError.
    """
    command = parser(
        prog="fedray partition",
        description="Who gets how much of what: the partition of an experiment, in words and as a picture, without "
        "training anything.",
    )
    command.add_argument("overrides", nargs="*", help="as for a run: +experiment=NAME partition.alpha=0.1 seed=1 ...")
    command.add_argument("--output", type=Path, metavar="FILE", help="write the picture, as .png, .pdf or .svg")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the manifest with its figures")
    command.add_argument("--config-dir", metavar="DIR", help="your own yaml and code")
    options = command.parse_intermixed_args(arguments)
    if options.output is not None:
        check_output(options.output)
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(
            f"--json is {str(options.json)!r}; the folder {options.json.parent} does not exist, so make it first"
        )
    dealt = deal(options.overrides, options.config_dir)
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    print(f"{dealt.title}\n\n{words(dealt.manifest, dealt.num_available)}\n")
    console.print(picture(dealt.manifest, width=console.width))
    if options.json is not None:
        options.json.write_text(json.dumps(record(dealt.manifest)), encoding="utf-8")
        print(f"manifest: {options.json}")
    if options.output is not None:
        save(dealt.manifest, options.output, title=dealt.title)
        print(f"picture: {options.output}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a partition comes to.

    size_quantiles:     samples of a client: smallest, 10 %, quarter, median, three quarters, 90 %, largest.
    classes_per_client: mean number of classes of which a client has a sample.
    total_variation:    mean over clients of the total variation distance between a client's label shares and those of
                        all clients together: 0 if equal, 1 if they have nothing in common.
    jensen_shannon:     likewise the Jensen-Shannon distance, the root of the divergence in bits: from 0 to 1.
    """

    hash: str
    num_clients: int
    num_samples: int
    num_classes: int
    size_quantiles: tuple[float, ...]
    classes_per_client: float
    total_variation: float
    jensen_shannon: float


def summary(manifest: Mapping[str, Any]) -> Summary:
    """The figures of a partition. Raises ConfigError if the manifest has no histogram."""
    counts = _counts(manifest)
    sizes = counts.sum(axis=1)
    shares, whole = counts / sizes[:, None], counts.sum(axis=0) / counts.sum()
    middle = (shares + whole) / 2
    bits = (_bits(shares, middle) + _bits(np.broadcast_to(whole, shares.shape), middle)) / 2
    return Summary(
        hash=str(manifest["hash"]),
        num_clients=len(counts),
        num_samples=int(counts.sum()),
        num_classes=counts.shape[1],
        size_quantiles=tuple(np.quantile(sizes, (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)).tolist()),
        classes_per_client=float((counts > 0).sum(axis=1).mean()),
        total_variation=float(abs(shares - whole).sum(axis=1).mean() / 2),
        jensen_shannon=float(np.sqrt(np.maximum(bits, 0)).mean()),
    )


def record(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its figures, in plain JSON types."""
    return {**manifest, "summary": asdict(summary(manifest))}


def words(manifest: Mapping[str, Any], num_available: int | None = None) -> str:
    """The figures in plain words, one line each. num_available: training samples there are, dealt out or not."""
    found = summary(manifest)
    least, tenth, quarter, median, three_quarters, ninetieth, most = (f"{q:,.0f}" for q in found.size_quantiles)
    dealt = f"{found.num_samples:,} samples"
    if num_available == found.num_samples:
        dealt += ", every one of the training set"
    elif num_available is not None:
        dealt += f" of the {num_available:,} of the training set"
    sizes = [
        ("a client has", f"{median} samples in the median, from {least} to {most}"),
        ("spread", f"half of the clients have {quarter} to {three_quarters}, four fifths {tenth} to {ninetieth}"),
    ]
    if least == most:
        sizes = [("a client has", f"{most} samples, as every other")]
    rows = [
        ("partition", found.hash),
        ("clients", f"{found.num_clients:,}"),
        ("dealt out", dealt),
        *sizes,
        ("classes", f"{found.classes_per_client:.1f} of {found.num_classes} at a client in the mean"),
        (
            "label skew",
            f"{found.total_variation:.3f} in the mean (total variation distance of a client's labels from those of "
            "all: 0 is none, 1 nothing in common)",
        ),
        ("", f"{found.jensen_shannon:.3f} as Jensen-Shannon distance, on the same scale"),
    ]
    return "\n".join(f"{name:<13} {text}" for name, text in rows)


# -- in a terminal ---------------------------------------------------------------------------------------------------


def picture(manifest: Mapping[str, Any], *, width: int = 100) -> RenderableType:
    """The partition drawn in characters of a terminal of `width` columns; legible without colours too."""
    from rich.console import Group
    from rich.text import Text

    counts = _counts(manifest)
    few = len(counts) <= FEW
    if few and counts.shape[1] <= FEW_CLASSES:
        return Group(*_stacked(counts, max(width, 60)))
    heat = _heat(counts, max(width, 60), sort=not few)
    return Group(*heat) if few else Group(*heat, Text(""), *_size_bars(counts.sum(axis=1)))


def _stacked(counts: np.ndarray, width: int) -> list[Text]:
    """A line per client: its classes in proportion, each by its symbol, and its size."""
    from rich.text import Text

    sizes = counts.sum(axis=1)
    digits, room = len(f"{len(counts) - 1}"), len(f"{sizes.max():,}")
    columns = width - digits - room - _BAR_WIDTH - 4
    lines = [Text(f"{'':{digits}} {'classes':<{columns}} {'samples'}", style="bold")]
    for client, row in enumerate(counts):
        line = Text(f"{client:>{digits}} ")
        for label, cells in enumerate(_whole(row, columns)):
            line.append(_SYMBOLS[label] * int(cells), style=f"white on {_COLOURS[label]}")
        line.append(f" {sizes[client]:>{room},} {_bar(sizes[client] / sizes.max(), _BAR_WIDTH)}")
        lines.append(line)
    note = "A digit is a class, and as many of them as its share of the client's samples."
    if counts.shape[1] > 10:
        note += f" Classes from 10 on are letters, from a to {_SYMBOLS[counts.shape[1] - 1]}."
    lines.append(Text(note, style="dim"))
    return lines


def _heat(counts: np.ndarray, width: int, *, sort: bool) -> list[Text]:
    """A line per client or bin of clients, a column per class or bin of classes, darker for a larger share."""
    from rich.text import Text

    sizes = counts.sum(axis=1)
    order = _by_dominant(counts) if sort else np.arange(len(counts))
    bins = np.array_split(order, min(HEAT_ROWS if sort else FEW, len(counts)))
    names = [f"{len(rows)} clients" if sort else f"client {rows[0]}" for rows in bins]
    margin, heading = max(len(name) for name in names), "samples each"
    columns = width - margin - max(len(f"{sizes.max():,}"), len(heading)) - 4
    groups = np.array_split(np.arange(counts.shape[1]), min(columns, counts.shape[1]))
    cell = max(1, min(4, columns // len(groups)))
    shares = counts / sizes[:, None]
    means = np.array([[shares[np.ix_(rows, labels)].sum() / len(rows) for labels in groups] for rows in bins])
    top = max(means.max(), min(1.0, _HEADROOM / len(groups)))
    first, last = f"class {groups[0][0]}", f"{groups[-1][-1]}"
    scale = first + " " * max(1, len(groups) * cell - len(first) - len(last)) + last
    lines = [Text(f"{'':{margin}} {scale:<{len(groups) * cell}}  {heading}", style="bold")]
    for name, rows, row in zip(names, bins, means, strict=True):
        line = Text(f"{name:>{margin}} ")
        for value in row:
            shade = int(np.ceil(value / top * (len(_SHADES) - 1) - 1e-9))
            line.append(_SHADES[shade] * cell, style=f"color({232 + 6 + int(value / top * 17)})")
        line.append(f"  {sizes[rows].mean():,.0f}")
        lines.append(line)
    each = "a class" if len(groups) == counts.shape[1] else f"{len(groups[0])} classes"
    steps = ", ".join(f"{shade} to {top * (at + 1) / (len(_SHADES) - 1):.2f}" for at, shade in enumerate(_SHADES[1:]))
    how = "Clients are sorted by their most frequent class. " if sort else ""
    lines.append(Text(f"{how}Share of {each} in a client's samples: {steps}.", style="dim"))
    return lines


def _size_bars(sizes: np.ndarray) -> list[Text]:
    from rich.text import Text

    edges = _size_edges(sizes)
    found = np.histogram(sizes, edges)[0]
    ends = [(int(np.ceil(low)), int(np.floor(high))) for low, high in pairwise(edges)]
    ranges = [f"{low:,} to {high:,}" if low < high else f"{low:,}" for low, high in ends]
    margin = max(len(text) for text in ranges)
    lines = [Text(f"{'samples':>{margin}} clients", style="bold")]
    for text, count in zip(ranges, found, strict=True):
        lines.append(Text(f"{text:>{margin}} {_bar(count / found.max(), 2 * _BAR_WIDTH)} {count:,}"))
    return lines


def _bar(share: float, width: int) -> str:
    """A bar of `width` characters at a share of 1, in eighths; never empty above 0."""
    eighths = int(np.ceil(share * width * 8 - 1e-9))
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


# -- in a file -------------------------------------------------------------------------------------------------------


def check_output(path: Path) -> None:
    """Refuse what `save` could not write. Raises ConfigError."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--output is {str(path)!r}; its name must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output is {str(path)!r}; the folder {path.parent} does not exist, so make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--output needs matplotlib: pip install 'fedray[report]', or leave it out")


def save(manifest: Mapping[str, Any], path: Path, *, title: str = "") -> None:
    """Write the picture to a file; .png, .pdf or .svg. Raises ConfigError."""
    check_output(path)
    from matplotlib.figure import Figure

    counts = _counts(manifest)
    few = len(counts) <= FEW
    # Without pyplot: it would keep the figure and ask for a display.
    figure = Figure(figsize=(11, 1.6 + 0.22 * max(len(counts), 8) if few else 8), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    if few:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
        if counts.shape[1] <= FEW_CLASSES:
            _draw_stacked(figure, left, counts)
        else:
            _draw_heat(figure, left, counts, sort=False)
        right.barh(np.arange(len(counts)), counts.sum(axis=1), color="#7f7f7f")
        right.set_xlabel("samples")
        right.xaxis.set_major_locator(_few_ticks(4))
        left.set_ylabel("client")
        left.set_ylim(len(counts) - 0.5, -0.5)
        left.yaxis.set_major_locator(_few_ticks(FEW))
    else:
        upper, lower = figure.subplots(2, 1, height_ratios=(3, 1))
        _draw_heat(figure, upper, counts, sort=True)
        _draw_sizes(lower, counts.sum(axis=1))
    figure.savefig(path, dpi=150)


def _draw_stacked(figure: Figure, axes: Axes, counts: np.ndarray) -> None:
    shares = counts / counts.sum(axis=1, keepdims=True)
    before = np.cumsum(shares, axis=1) - shares
    for label in range(counts.shape[1]):
        axes.barh(
            np.arange(len(counts)), shares[:, label], left=before[:, label], height=0.9, color=_COLOURS[label],
            label=f"{label}",
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of a client's samples")
    figure.legend(title="class", loc="outside right upper", fontsize=9)


def _draw_heat(figure: Figure, axes: Axes, counts: np.ndarray, *, sort: bool) -> None:
    """Clients along the long side: down where each has a row, across where they are many and sorted."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    if sort:
        shares = shares[_by_dominant(counts)].T
        axes.set_xlabel("clients, sorted by their most frequent class")
        axes.set_ylabel("class")
        axes.yaxis.set_major_locator(_few_ticks(FEW_CLASSES))
    else:
        axes.set_xlabel("class")
        axes.xaxis.set_major_locator(_few_ticks(FEW_CLASSES))
    top = max(shares.max(), min(1.0, _HEADROOM / counts.shape[1]))
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=top)
    figure.colorbar(image, ax=axes, label="share of a client's samples", pad=0.01)


def _draw_sizes(axes: Axes, sizes: np.ndarray) -> None:
    edges = _size_edges(sizes)
    axes.hist(sizes, bins=edges.tolist(), color="#7f7f7f", edgecolor="white")
    if _is_wide(sizes):
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(_few_ticks(10))
    axes.yaxis.set_major_locator(_few_ticks(6))
    axes.set_xlabel("samples of a client")
    axes.set_ylabel("clients")


def _few_ticks(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True, min_n_ticks=1)


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _counts(manifest: Mapping[str, Any]) -> np.ndarray:
    if "histogram" not in manifest or "hash" not in manifest:
        raise ConfigError("the manifest has no histogram; take what fedray.data.manifest returns")
    counts = np.asarray(manifest["histogram"], np.int64)
    if counts.ndim != 2 or not counts.size or (counts.sum(axis=1) < 1).any():
        raise ConfigError(
            f"the manifest's histogram has shape {counts.shape}; it needs a row with at least one sample for each "
            "client, as fedray.data.manifest returns"
        )
    return counts


def _bits(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each row in bits; q is above 0 where p is."""
    ratio = np.divide(p, q, out=np.ones_like(q), where=p > 0)
    divergence: np.ndarray = (p * np.log2(ratio)).sum(axis=1)
    return divergence


def _by_dominant(counts: np.ndarray) -> np.ndarray:
    """Clients by their most frequent class, within one by falling share of it in tenths, then by the next class."""
    tenths = np.round(counts.max(axis=1) / counts.sum(axis=1), 1)
    first = counts.argmax(axis=1)
    others = counts.copy()
    others[np.arange(len(counts)), first] = -1
    order: np.ndarray = np.lexsort((others.argmax(axis=1), -tenths, first))
    return order


def _whole(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `weights` that sum to `total`, by largest remainder."""
    exact = weights * total / weights.sum()
    whole: np.ndarray = np.floor(exact).astype(np.int64)
    rest = total - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:rest]] += 1
    return whole


def _is_wide(sizes: np.ndarray) -> bool:
    return bool(sizes.max() > _WIDE_RANGE * sizes.min())


def _size_edges(sizes: np.ndarray) -> np.ndarray:
    """Edges of bins of sizes, halfway between whole numbers, so that no size lies on one."""
    least, most = int(sizes.min()), int(sizes.max())
    if _is_wide(sizes):
        edges = np.geomspace(least, most + 1, SIZE_BINS + 1)
    else:
        edges = np.linspace(least, most + 1, min(SIZE_BINS, most + 1 - least) + 1)
    between: np.ndarray = np.unique(np.round(edges)) - 0.5
    return between
