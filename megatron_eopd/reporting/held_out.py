"""Held-out figures before and after, and paired tests of them. In: rows and reports of evaluations.
Out: tables and sentences.
"""

import math
from collections.abc import Sequence
from typing import Any

from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation import comparison
from megatron_eopd.evaluation.reports import BOUNDS, Report
from megatron_eopd.reporting.document import Part, Table
from megatron_eopd.reporting.run_records import Row, RunRecord

UNKNOWN = "–"


def before_after(evaluations: Sequence[Row]) -> Table:
    """Every figure at the first and at the last of at least one evaluation."""
    before, after = evaluations[0], evaluations[-1]
    header = (
        "held-out figure",
        f"before (iteration {before['iteration']})",
        f"after (iteration {after['iteration']})",
        "change",
    )
    rows = [
        (
            name.removeprefix("eval/"),
            shown(name, before),
            shown(name, after),
            _change(name, before, after),
        )
        for name in figure_names([before, after])
    ]
    return Table(header, tuple(rows))


def figure_names(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name.startswith("eval/") and not name.endswith(BOUNDS)]


def _change(name: str, before: Row, after: Row) -> str:
    return f"{after[name] - before[name]:+.4f}" if name in before and name in after else UNKNOWN


def shown(name: str, figures: dict[str, Any]) -> str:
    """The mean accuracy with its 95 % interval, every other figure alone."""
    if name not in figures:
        return UNKNOWN
    task, _, figure = name.rpartition("/")
    text = f"{figures[name]:.4f}"
    low, high = (figures.get(f"{task}/{bound}", math.nan) for bound in BOUNDS)
    has_interval = figure.startswith("avg@") and not math.isnan(low)
    return f"{text} ({low:.4f} to {high:.4f})" if has_interval else text


def side_by_side(runs: Sequence[RunRecord]) -> Table:
    """Of several evaluated runs, each figure before → after."""
    ends = [(run.evaluation_rows[0], run.evaluation_rows[-1]) for run in runs]
    header = tuple(
        f"{run.label} ({before['iteration']} → {after['iteration']})"
        for run, (before, after) in zip(runs, ends, strict=True)
    )
    rows = [
        (
            name.removeprefix("eval/"),
            *(f"{shown(name, before)} → {shown(name, after)}" for before, after in ends),
        )
        for name in figure_names([row for pair in ends for row in pair])
    ]
    return Table(("held-out figure", *header), tuple(rows))


# --- paired tests -------------------------------------------------------------------------------


def paired_parts(label_a: str, a: Report, label_b: str, b: Report) -> list[Part]:
    """What the same problems say of a difference, or why they cannot say it."""
    try:
        comparison.check_alike(a, b)
    except ConfigError as error:
        return [f"No paired test of {label_a} (A) against {label_b} (B). {error}"]
    rows = comparison.rows_of(a, b)
    cells = [row.cells[:-1] for row in rows]
    header = ("figure", label_a, label_b, "difference", "95 % interval", "p")
    return [
        f"{a.task}: paired test over the same {a.settings.num_problems:,} problems, "
        f"{label_b} against {label_a}. {_seen(rows)} p: how often exchanging the two at random, "
        f"problem by problem, makes a difference this large. Of {len(rows)} figures, which "
        f"go together, one in 20 has p < {comparison.LEVEL} by chance.",
        Table(header, tuple(cells)),
    ]


def _seen(rows: Sequence[comparison.Row]) -> str:
    """Differences at the 5 % level, in words."""
    seen = [row for row in rows if row.is_shown]
    if not seen:
        return "No difference can be seen."
    kinds = [
        (word, [row.name for row in seen if (row.paired.difference > 0) == is_up])
        for word, is_up in (("higher", True), ("lower", False))
    ]
    told = [f"{word}: {', '.join(names)}" for word, names in kinds if names]
    return f"At the 5 % level {'; '.join(told)}."
