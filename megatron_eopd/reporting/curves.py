"""Metrics over the iterations, as panels. In: RunRecords. Out: matplotlib Figures.

Of one run, colours are quantities. Of several, colours are runs and line styles quantities.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_eopd.reporting.drawing import (
    COLOURS,
    GREY,
    STYLES,
    Key,
    colours,
    draw_curve,
    grid,
    label_panel,
    plain_log_ticks,
    whole_ticks,
)
from megatron_eopd.reporting.run_records import Row, RunRecord

NATS = "nats"
Rows = Callable[[RunRecord], Sequence[Row]]
"""Which lines of a run are drawn."""


class Curve(NamedTuple):
    label: str
    metric: str
    low: str = ""
    """Metrics of the ends of its interval, if it has one."""
    high: str = ""
    minus: float = 0.0
    """Drawn is the metric less this."""


class Panel(NamedTuple):
    title: str
    unit: str
    curves: tuple[Curve, ...]
    is_log: bool = False
    """Where values are positive and span a decade."""
    from_zero: bool = False
    if_any: bool = False
    """Left out where all values are 0."""


class Drawn(NamedTuple):
    name: str
    """Of its file."""
    caption: str
    figure: Figure


def over_iterations(
    panels: Sequence[Panel], runs: Sequence[RunRecord], rows: Rows
) -> Figure | None:
    """Without panels that no run has anything of; None where none is left."""
    shown = [panel for panel in panels if _is_shown(panel, runs, rows)]
    if not shown:
        return None
    figure, all_axes = grid(len(shown), keys=run_keys(runs))
    for axes, panel in zip(all_axes, shown, strict=True):
        draw_panel(axes, panel, runs, rows)
    return figure


def _is_shown(panel: Panel, runs: Sequence[RunRecord], rows: Rows) -> bool:
    values = _values(panel.curves, runs, rows)
    return any(values) if panel.if_any else any(True for _ in values)


def _values(curves: Sequence[Curve], runs: Sequence[RunRecord], rows: Rows) -> Iterator[float]:
    metrics = [curve.metric for curve in curves]
    return (row[m] for run in runs for row in rows(run) for m in metrics if m in row)


def run_keys(runs: Sequence[RunRecord]) -> list[Key]:
    """None of a single run."""
    if len(runs) == 1:
        return []
    return [Key(run.label, colour) for run, colour in zip(runs, colours(len(runs)), strict=True)]


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[RunRecord], rows: Rows) -> None:
    of_runs = run_keys(runs)
    shown = [c for c in panel.curves if any(True for _ in _values((c,), runs, rows))]
    keys = [
        Key(curve.label, GREY if of_runs else COLOURS[n], STYLES[n] if of_runs else "-")
        for n, curve in enumerate(shown)
    ]
    for curve, key in zip(shown, keys, strict=True):
        for m, run in enumerate(runs):
            own = Key(f"{run.label}, {key.label}", of_runs[m].colour, key.style) if of_runs else key
            _draw_run(axes, curve, rows(run), own)
    if panel.is_log and _spans_decades(axes):
        axes.set_yscale("log")
        plain_log_ticks(axes)
    if panel.from_zero:
        top = max(line.get_ydata().max() for line in axes.lines)
        axes.set_ylim(0, 1.08 * top or 1)
    label_panel(axes, panel.title, panel.unit, keys if len(panel.curves) > 1 else ())
    axes.set_xlabel("iteration")
    whole_ticks(axes)


def _spans_decades(axes: Axes) -> bool:
    """One at least; of less a linear scale has better ticks."""
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    return values.min() > 0 and values.max() >= 10 * values.min()


def _draw_run(axes: Axes, curve: Curve, rows: Iterable[Row], key: Key) -> None:
    x_N, y_N = points(rows, curve.metric)
    if not len(x_N):
        return
    draw_curve(axes, x_N, y_N - curve.minus, key)
    if curve.low:
        _, low_N = points(rows, curve.low)
        _, high_N = points(rows, curve.high)
        if len(low_N) == len(high_N) == len(x_N):
            axes.fill_between(x_N, low_N, high_N, color=key.colour, alpha=0.15, lw=0)


def points(rows: Iterable[Row], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, values)."""
    found = [(row["iteration"], row[metric]) for row in rows if metric in row]
    x, y = zip(*found, strict=True) if found else ((), ())
    return np.array(x, dtype=float), np.array(y, dtype=float)
