"""How figures of a report are drawn: panels in a grid, lines, SVG. In: numbers. Out: matplotlib
Figures, and their SVG.

Through matplotlib's objects, never pyplot: a training run's process keeps no state of it.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

# Shapes: N points of a curve, M points that are drawn.

MOST_POINTS = 500
"""Of a drawn curve; a panel is some 300 pixels wide."""
FEW_POINTS = 12
"""Up to here each has a dot."""
COLUMNS = 3
WIDTH, HEIGHT = 3.7, 2.7
"""Of a panel, in inches."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's, which colour-blind people tell apart."""
STYLES = ("-", "--", ":", "-.")
GREY = "#555555"
LONGEST_LABEL = 40

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and can be searched
    "svg.hashsalt": "report",  # the same figure gives the same bytes
    "text.parse_math": False,  # a $ in the name of a run is a $
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "axes.formatter.use_mathtext": False,
    "grid.color": "#e3e6e8",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
}


@contextmanager
def style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The reader's fonts show the text, not those of this machine.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


def colours(count: int) -> list[str]:
    """One each; beyond the palette, steps of cividis."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    steps = matplotlib.colormaps["cividis"](np.linspace(0, 0.95, count))
    return [matplotlib.colors.to_hex(step) for step in steps]


class Key(NamedTuple):
    """An entry of a legend."""

    label: str
    colour: str
    style: str = "-"


def legend_of(keys: Sequence[Key]) -> tuple[list[Line2D], list[str]]:
    """Handles, and labels that matplotlib shows: it leaves out those that begin with _."""
    handles = [Line2D([], [], color=key.colour, linestyle=key.style) for key in keys]
    return handles, [_short(key.label) for key in keys]


def _short(label: str) -> str:
    label = " ".join(label.split())
    kept = label if len(label) <= LONGEST_LABEL else "…" + label[1 - LONGEST_LABEL :]
    return f" {kept}" if kept.startswith("_") else kept


def grid(count: int, *, keys: Sequence[Key] = ()) -> tuple[Figure, list[Axes]]:
    """So many panels, in rows; `keys`: of a legend for all of them."""
    columns = min(count, COLUMNS)
    rows = ceil(count / columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.3 * bool(keys)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.remove()
    if keys:
        handles, labels = legend_of(keys)
        figure.legend(handles, labels, loc="outside upper left", ncols=COLUMNS)
    return figure, list(axes[:count])


def label_panel(axes: Axes, title: str, unit: str, keys: Sequence[Key] = ()) -> None:
    axes.set_title(_short(title))
    axes.set_ylabel(unit)
    if keys:
        axes.legend(*legend_of(keys))


def whole_ticks(axes: Axes) -> None:
    """Along x, where there is nothing between two whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def plain_log_ticks(axes: Axes) -> None:
    """Along y; by itself matplotlib writes them as mathematics."""
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())


@dataclass(frozen=True)
class Thinned:
    x_M: np.ndarray
    mean_M: np.ndarray
    low_M: np.ndarray
    high_M: np.ndarray


def thin(x_N: np.ndarray, y_N: np.ndarray, most: int = MOST_POINTS) -> Thinned:
    """At most so many points: means of neighbours, with the smallest and the largest of them."""
    step = ceil(len(x_N) / most) if len(x_N) else 1
    starts = np.arange(0, len(x_N), step)
    sizes = np.diff(np.append(starts, len(x_N)))
    return Thinned(
        np.add.reduceat(x_N, starts) / sizes,
        np.add.reduceat(y_N, starts) / sizes,
        np.minimum.reduceat(y_N, starts),
        np.maximum.reduceat(y_N, starts),
    )


def draw_curve(axes: Axes, x_N: np.ndarray, y_N: np.ndarray, key: Key) -> None:
    """A line, with dots where it has few points. Thinned, it has a band from least to most, so that
    a spike does not hide."""
    drawn = thin(np.asarray(x_N, dtype=float), np.asarray(y_N, dtype=float))
    if len(drawn.x_M) < len(x_N):
        axes.fill_between(drawn.x_M, drawn.low_M, drawn.high_M, color=key.colour, alpha=0.18, lw=0)
    axes.plot(
        drawn.x_M,
        drawn.mean_M,
        color=key.colour,
        linestyle=key.style,
        marker="o" if len(drawn.x_M) <= FEW_POINTS else "",
        markersize=3.5,
        label=_short(key.label),
    )


_PATH = re.compile(r' d="[^"]*"')
_DECIMALS = re.compile(r"(\.\d\d)\d+")


def to_svg(figure: Figure) -> str:
    """An element without a head, fit to stand in a page; coordinates to a hundredth of a point."""
    with style():
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    element = text[text.index("<svg") :]
    return _PATH.sub(lambda found: _DECIMALS.sub(r"\1", found[0]), element)
