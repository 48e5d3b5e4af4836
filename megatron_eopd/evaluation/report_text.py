"""A report as a person reads it. In: a Report. Out: Markdown."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_eopd.evaluation.estimators import verdict_figure
from megatron_eopd.evaluation.reports import Report
from megatron_eopd.tasks.task import Verdict


def report_markdown(report: Report) -> str:
    """Figures with their intervals, verdicts, and how it was sampled."""
    settings = report.settings
    size = f"{settings.num_problems:,} problems, {settings.num_samples} samples of each"
    verdict_names = {verdict_figure(verdict) for verdict in Verdict}
    rows = [
        (name, number(value), interval(report, name))
        for name, value in report.figures.items()
        if name not in verdict_names
    ]
    return "\n\n".join(
        [
            f"## {report.task}",
            f"Model: {described(report.model)}. {size}. Intervals are of the mean over problems "
            f"like these, by bootstrap over problems with their samples.",
            table(("figure", "value", "95 % interval"), rows),
            table(("verdict", "samples", "share", "95 % interval"), _verdict_rows(report)),
            *_curve_tables(report),
            table(("setting", "value"), [(n, told(v)) for n, v in settings]),
        ]
    )


def _verdict_rows(report: Report) -> list[tuple[str, ...]]:
    verdicts = [verdict for problem in report.problems for verdict in problem.verdicts]
    counts = {verdict: verdicts.count(verdict) for verdict in Verdict}
    return [
        (v.value, f"{n:,}", number(n / len(verdicts)), interval(report, verdict_figure(v)))
        for v, n in counts.items()
    ]


def _curve_tables(report: Report) -> list[str]:
    """None where nothing was measured."""
    if not report.curves:
        return []
    parts = len(next(iter(report.curves.values())))
    header = ("over the response", *(f"{100 * n // parts} %" for n in range(parts)))
    rows = [
        (name, *("" if value is None else number(value) for value in values))
        for name, values in report.curves.items()
    ]
    return [table(header, rows)]


# --- pieces -------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text; the others are right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *cells))


def interval(report: Report, name: str) -> str:
    """Empty for a figure that has none."""
    ends = report.intervals.get(name)
    return f"[{number(ends[0])}, {number(ends[1])}]" if ends else ""


def number(value: float, *, sign: bool = False) -> str:
    """Three decimals, fewer from 10 up: 0.523, 8.125, 318.4."""
    form = f"{'+' if sign else ''}.{3 if abs(value) < 10 else 1}f"
    text = format(value, form)
    return text if text.strip("+-0.") else text.lstrip("+-")  # no sign on 0.000


def described(named: dict[str, Any]) -> str:
    return ", ".join(f"{name} {told(value)}" for name, value in named.items()) or "unnamed model"


def told(value: Any) -> str:
    """A setting's value, a digest by its beginning."""
    if isinstance(value, dict):
        return described(value) if value else "none"
    if isinstance(value, str):
        is_digest = len(value) >= 32 and not value.strip("0123456789abcdef")
        return value[:12] if is_digest else value
    return json.dumps(value)
