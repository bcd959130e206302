"""Draws what `plot` worked out, with matplotlib: widths of columns, fonts that stay text, looks that survive print."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.errors import ConfigError
from fedray.report.plot import Boxes, Curve, Drawing, Heat, Lines, Points, Range, Width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES: Mapping[Width, float] = {"single": 3.35, "double": 6.9}
"""Columns of the usual two-column layouts: 85 and 175 mm."""
DOTS_PER_INCH = 300

# Okabe and Ito's colours without yellow, which white paper swallows: they differ for every kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
# With seven colours and four dashes no two of the first 28 lines are alike; the markers differ for the first 14.
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h", "d", "8")
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.2,
    "legend.labelspacing": 0.35,
    # Type 3 fonts are refused by many submission systems; 42 embeds TrueType.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "axes.unicode_minus": True,
    # Names come from configurations: a dollar in one is a dollar, not the start of a formula.
    "text.parse_math": False,
}
_MARKS = 8
"""Markers on a line, about."""
_WIDE_RANGE = 6
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
_ASIDE = 0.04
"""Points of the same sparsity stand side by side so that their bars can be told apart: over this part of the axis."""
_PANEL_INCHES = 1.75
_ROW_INCHES = 0.19


def draw(drawing: Drawing, paths: Sequence[Path], width: Width) -> None:
    """Write the figure to each path, in the format of its ending."""
    with style():
        figure = figure_of(drawing, width)
        for path in paths:
            # Without a date the same runs give the same file.
            metadata = {".pdf": {"CreationDate": None}, ".png": {"Software": None}}.get(path.suffix, {})
            figure.savefig(path, dpi=DOTS_PER_INCH, metadata=metadata)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Sizes and fonts, for making a figure and for writing it; afterwards matplotlib is as before."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style would not fit these sizes
        matplotlib.rcParams.update(_STYLE)
        yield


def figure_of(drawing: Drawing, width: Width) -> Figure:
    """The figure, to be made and written within `style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: it would keep the figure and ask for a display.
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03)
    inches = INCHES[width]
    if isinstance(drawing, Heat):
        _heat(figure, drawing, inches)
    elif isinstance(drawing, Boxes):
        _boxes(figure, drawing, inches)
    else:
        _panels(figure, drawing, inches)
    return figure


# -- lines and points ------------------------------------------------------------------------------------------------


def _panels(figure: Figure, drawing: Lines | Points, inches: float) -> None:
    names = list(dict.fromkeys(curve.panel for curve in drawing.curves))
    across = min(len(names), max(1, int(inches // 1.6)))
    if len(names) == 4 and across == 3:
        across = 4 if inches > 6 else 2
    down = math.ceil(len(names) / across)
    one = len(names) == 1
    tall = (2.3 if inches < 5 else 3.0) if one else _PANEL_INCHES * down
    figure.set_size_inches(inches, tall)
    grid = figure.subplots(down, across, sharex=not _has_own_scales(drawing), sharey=True, squeeze=False)
    for at, axes in enumerate(grid.flat):
        if at >= len(names):
            axes.set_axis_off()
            # The panel above shows its numbers now.
            grid[(at // across) - 1, at % across].tick_params(labelbottom=True)
            continue
        curves = [curve for curve in drawing.curves if curve.panel == names[at]]
        if not one:
            axes.set_title(names[at])
        if isinstance(drawing, Lines):
            _lines(axes, curves)
        else:
            _points(axes, curves, drawing)
    _scales(drawing, list(grid.flat)[: len(names)])
    _zoom(drawing, list(grid.flat)[: len(names)])
    for at, axes in enumerate(grid.flat):
        if at + across >= len(names):
            axes.set_xlabel(drawing.x_label)
        if at % across == 0:
            axes.set_ylabel(drawing.y_label if one else drawing.y_label.replace(" (", "\n("))
    _legend(figure, drawing, inches, tall)


def _has_own_scales(drawing: Lines | Points) -> bool:
    """Whether each panel has its own x: megabytes of different sparsities are far apart."""
    ends: dict[str, float] = {}
    for curve in drawing.curves:
        ends[curve.panel] = max(ends.get(curve.panel, 0.0), max(curve.x))
    return drawing.spent and drawing.x_range is None and max(ends.values()) > 3 * min(ends.values())


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _DASHES[number % len(_DASHES)]}


def _marker(number: int) -> dict[str, Any]:
    return {"marker": _MARKERS[number % len(_MARKERS)], "markeredgecolor": "white", "markeredgewidth": 0.3}


def _lines(axes: Axes, curves: Sequence[Curve]) -> None:
    for at, curve in enumerate(curves):
        step = max(1, len(curve.x) // _MARKS)
        first = at * step // max(1, len(curves)) if step > 1 else 0  # markers of different lines side by side
        axes.plot(
            curve.x, curve.y, **_look(curve.look), **_marker(curve.look), markevery=(first, step), zorder=3 + at / 100
        )
        if any(spread is not None for spread in curve.y_spread):
            low = [y - (spread or 0.0) for y, spread in zip(curve.y, curve.y_spread, strict=True)]
            high = [y + (spread or 0.0) for y, spread in zip(curve.y, curve.y_spread, strict=True)]
            axes.fill_between(curve.x, low, high, color=_look(curve.look)["color"], alpha=0.13, linewidth=0, zorder=2)


def _points(axes: Axes, curves: Sequence[Curve], drawing: Points) -> None:
    joined = drawing.sparsity_axis
    for at, curve in enumerate(curves):
        x = [_removed(value) for value in curve.x] if drawing.sparsity_axis and _crowded(drawing) else list(curve.x)
        if drawing.sparsity_axis:
            wide = _removed(max(x for one in curves for x in one.x)) if _crowded(drawing) else 1.0
            x = [value + wide * _ASIDE * (at / max(1, len(curves) - 1) - 0.5) for value in x]
            if len(x) == 1 and curve.x[0] == 0.0:
                axes.axhline(curve.y[0], color=_look(curve.look)["color"], linewidth=0.6, linestyle=(0, (1, 2)))
        look = _look(curve.look)
        bars: dict[str, Any] = {"elinewidth": 0.7, "capsize": 1.5, "capthick": 0.7, "zorder": 3 + at / 100}
        spreads: dict[str, Any] = {"yerr": [spread or 0.0 for spread in curve.y_spread]}
        if not drawing.sparsity_axis:
            spreads["xerr"] = [spread or 0.0 for spread in curve.x_spread]
        line = axes.errorbar(x, curve.y, **spreads, **_marker(curve.look), **look, **bars)
        if not joined:
            line.lines[0].set_linewidth(0.5)  # the points matter; the line only says that they are one method's
            line.lines[0].set_alpha(0.85)
    if drawing.front:
        xs, ys = zip(*drawing.front, strict=True)
        # Between two points of the front nothing is reached but what the left one has.
        axes.step(xs, ys, where="post", color="#888888", linewidth=2.6, alpha=0.45, zorder=2, solid_capstyle="round")


def _crowded(drawing: Points) -> bool:
    """Whether sparsities crowd at 1, so that the axis shows what is kept on a logarithmic scale."""
    return max(x for curve in drawing.curves for x in curve.x) >= 0.85


def _removed(sparsity: float) -> float:
    return -math.log2(max(1.0 - sparsity, 1e-6))


def _scales(drawing: Lines | Points, every: Sequence[Axes]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    if isinstance(drawing, Points) and drawing.sparsity_axis:
        if not _crowded(drawing):
            return
        there = [x for curve in drawing.curves for x in curve.x]
        least, most = min(there), max(there)
        nice = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
        ticks = [tick for tick in nice if least - 0.01 <= tick <= most + (1 - most) / 4]
        for axes in every:
            axes.xaxis.set_major_locator(FixedLocator([_removed(tick) for tick in ticks]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{1 - 2.0**-x:.4g}"))
        return
    names = list(dict.fromkeys(curve.panel for curve in drawing.curves))
    most = 6 if len(names) == 1 else 4  # numbers that stand side by side below a panel
    for name, axes in zip(names, every, strict=True):
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if not _is_logarithmic(drawing):
            axes.xaxis.set_major_locator(MaxNLocator(nbins=most - 1, integer=drawing.x_label == "round"))
            continue
        axes.set_xscale("log")
        own = _has_own_scales(drawing)
        x = x_shown(drawing) or [x for curve in drawing.curves if curve.panel == name or not own for x in curve.x]
        axes.xaxis.set_major_locator(FixedLocator(_log_ticks(min(x), max(x), most)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers for a logarithmic axis: as many as fit of 1, 2 and 5, or of the powers of ten."""
    from matplotlib.ticker import MaxNLocator

    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= most:
            break
    if len(ticks) > most:
        return ticks[:: math.ceil(len(ticks) / most)]
    if len(ticks) < 2:  # less than a decade: round numbers as on a linear axis
        return [float(tick) for tick in MaxNLocator(nbins=3).tick_values(low, high) if low <= tick <= high]
    return ticks


def x_shown(drawing: Lines | Points) -> Range:
    """The part of the x axis that was asked for; None for all of it.

    A logarithmic axis has no 0: there a lower end that is not positive stands for where the curves begin. Raises
    ConfigError if the upper end is not positive either.
    """
    if drawing.x_range is None or drawing.x_range[0] > 0 or not _is_logarithmic(drawing):
        return drawing.x_range
    low, high = drawing.x_range
    if high <= 0:
        raise ConfigError(
            f"--x is '{low:g},{high:g}'; the axis is logarithmic, so its upper end must be above 0, as in --x 1,10"
        )
    least = min(min(curve.x) for curve in drawing.curves)
    # With the margin that matplotlib leaves; where all curves lie beyond the upper end, the decade below it.
    return (least * (least / high) ** 0.05 if least < high else high / 10), high


def _is_logarithmic(drawing: Lines | Points) -> bool:
    """Whether what the curves end at is far apart, so that a linear axis would squeeze the cheap ones."""
    if not drawing.spent:
        return False
    ends = [x for curve in drawing.curves for x in (curve.x if isinstance(drawing, Points) else curve.x[-1:])]
    return min(min(curve.x) for curve in drawing.curves) > 0 and max(ends) > _WIDE_RANGE * min(ends)


def _zoom(drawing: Lines | Points, every: Sequence[Axes]) -> None:
    x_range = x_shown(drawing)
    for axes in every:
        if x_range is not None and not (isinstance(drawing, Points) and drawing.sparsity_axis):
            axes.set_xlim(*x_range)
        if drawing.y_range is not None:
            axes.set_ylim(*drawing.y_range)


def _legend(figure: Figure, drawing: Lines | Points, inches: float, tall: float) -> None:
    """Below the axes, in as many columns as fit, with the figure so much taller."""
    from matplotlib.lines import Line2D

    first = {curve.label: curve.look for curve in reversed(drawing.curves)}
    names = sorted(first, key=first.__getitem__)
    handles = [Line2D([], [], **_look(first[name]), **_marker(first[name])) for name in names]
    texts = [_wrapped(name, inches - 0.6) for name in names]
    if isinstance(drawing, Points) and drawing.front:
        handles.append(Line2D([], [], color="#888888", linewidth=2.6, alpha=0.45))
        texts.append("front")
    if len(texts) == 1 and len(names) == 1:
        return
    for columns in range(min(len(texts), 6), 0, -1):
        legend = figure.legend(handles, texts, loc="outside lower center", ncols=columns)
        extent = legend.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        if extent.width / figure.dpi <= inches - 0.05 or columns == 1:
            break
        legend.remove()
    figure.set_size_inches(inches, tall + extent.height / figure.dpi)


def _wrapped(text: str, inches: float) -> str:
    """In lines that fit so many inches, at about 20 letters an inch."""
    return "\n".join(textwrap.wrap(text, max(8, int(inches * 20)), break_long_words=True)) or text


# -- names on the left -----------------------------------------------------------------------------------------------


def _heat(figure: Figure, drawing: Heat, inches: float) -> None:
    import numpy as np
    from matplotlib.ticker import FixedLocator

    cells = np.array([[math.nan if value is None else value for value in line] for line in drawing.cells])
    names, columns = [_wrapped(name, inches * 0.42) for name in drawing.labels], list(drawing.columns)
    figure.set_size_inches(inches, 1.25 + _rows(names))
    axes = figure.subplots()
    axes.grid(False)
    least = min(0.0, float(np.nanmin(cells)))
    image = axes.imshow(cells, aspect="auto", interpolation="nearest", cmap="cividis_r", vmin=least, vmax=1.0)
    axes.set_yticks(range(len(names)), names)
    every = math.ceil(len(columns) / (inches * 5))
    shown = range(0, len(columns), every)
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    axes.set_xticklabels([columns[at] for at in shown], rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlabel(drawing.x_label)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(columns) <= inches * 2.6:
        for row, line in enumerate(cells):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    ink = "white" if value > 0.55 else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
    bar = figure.colorbar(image, ax=axes, label=drawing.colour_label, pad=0.02, fraction=0.06, aspect=25)
    bar.outline.set_visible(False)


def _rows(names: Sequence[str]) -> float:
    """Inches of rows that are as tall as the tallest name."""
    lines = max(name.count("\n") + 1 for name in names)
    return len(names) * (_ROW_INCHES + 0.12 * (lines - 1))


def _boxes(figure: Figure, drawing: Boxes, inches: float) -> None:
    names = [_wrapped(name, inches * 0.42) for name in drawing.labels]
    figure.set_size_inches(inches, 1.0 + _rows(names))
    axes = figure.subplots()
    axes.boxplot(
        list(drawing.values),
        orientation="horizontal",
        whis=(10, 90),
        showmeans=True,
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": "#cfe3f1", "edgecolor": _COLOURS[0], "linewidth": 0.7},
        medianprops={"color": _COLOURS[0], "linewidth": 1.2},
        whiskerprops={"color": _COLOURS[0], "linewidth": 0.7},
        capprops={"color": _COLOURS[0], "linewidth": 0.7},
        meanprops={"marker": "D", "markerfacecolor": _COLOURS[1], "markeredgecolor": "white", "markersize": 3.2,
                   "markeredgewidth": 0.3},
        flierprops={"marker": ".", "markersize": 2, "markerfacecolor": "#777777", "markeredgecolor": "none"},
    )  # fmt: skip
    axes.set_yticks(range(1, len(names) + 1), names)
    axes.set_ylim(len(names) + 0.6, 0.4)
    axes.grid(False, axis="y")
    axes.set_xlabel(drawing.x_label)
    figure.supxlabel("box: quartiles and median; whiskers: 10 to 90 %; diamond: mean", fontsize=6)
    axes.tick_params(axis="y", length=0)
