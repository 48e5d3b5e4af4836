"""Pictures of the evaluations of one task: accuracy over the run, pass@k, and what differs along a
response. In: RunRecords. Out: Figures with captions.

Before is the first evaluation of a run, after its last one.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

from megatron_eopd.evaluation.reports import Report
from megatron_eopd.reporting.curves import (
    NATS,
    Curve,
    Drawn,
    Panel,
    over_iterations,
    run_keys,
)
from megatron_eopd.reporting.drawing import COLOURS, GREY, Key, grid, label_panel, legend_of, style
from megatron_eopd.reporting.run_records import Evaluated, Row, RunRecord

TEACHER, STUDENT = COLOURS[0], COLOURS[1]
BEFORE, AFTER = "--", "-"


def task_pictures(task: str, file_name: str, runs: Sequence[RunRecord]) -> Iterator[Drawn]:
    """`file_name`: what its pictures' names end in."""
    with style():
        if any(len(run.evaluation_rows) > 1 for run in runs):
            figure = over_iterations(held_out_panels(task, runs), runs, _rows)
            if figure is not None:
                yield Drawn(f"held_out_{file_name}", _HELD_OUT.format(task=task), figure)
        evaluated = [run for run in runs if task in run.evaluations]
        if evaluated:
            yield Drawn(f"pass_at_k_{file_name}", _PASS.format(task=task), pass_at_k(task, runs))
        for name, curve, unit in _ALONG:
            figure = along_response(task, evaluated, curve, unit)
            if figure is not None:
                yield Drawn(f"{name}_{file_name}", _CAPTIONS[name].format(task=task), figure)


def _rows(run: RunRecord) -> list[Row]:
    return run.evaluation_rows


_HELD_OUT = "{task}: held-out figures over the run; bands are 95 % intervals of the mean accuracy."
_PASS = (
    "{task}: pass@k, the share of problems that some of k samples solve, before and after, with 95 "
    "% intervals over problems."
)
_ALONG = (
    ("entropy_over_response", "entropy", NATS),
    ("gate_over_response", "above_threshold", "share of tokens"),
)
"""Name, curve of a report, unit."""
_CAPTIONS = {
    "entropy_over_response": "{task}: mean entropy over ten equal parts of a response, of teacher "
    "and student, at the student's own tokens, before (dashed) and after.",
    "gate_over_response": "{task}: share of tokens whose entropy reaches the gate's threshold, "
    "over ten equal parts of a response, before (dashed) and after.",
}


def held_out_panels(task: str, runs: Sequence[RunRecord]) -> list[Panel]:
    prefix = f"eval/{task}/"
    names = dict.fromkeys(name for run in runs for row in run.evaluation_rows for name in row)
    averages = [name for name in names if name.startswith(f"{prefix}avg@")]
    accuracy = tuple(
        Curve(name.removeprefix(prefix), name, f"{prefix}accuracy_low", f"{prefix}accuracy_high")
        for name in averages[:2]  # two where runs drew other numbers of samples
    )
    return [
        Panel("mean accuracy", "share of samples", accuracy),
        Panel(
            "divergences",
            NATS,
            (
                Curve("reverse KL", f"{prefix}reverse_kl"),
                Curve("forward KL", f"{prefix}forward_kl"),
            ),
        ),
        Panel(
            "mean entropy",
            NATS,
            (
                Curve("teacher", f"{prefix}teacher_entropy"),
                Curve("student", f"{prefix}student_entropy"),
            ),
        ),
    ]


# --- pass@k -------------------------------------------------------------------------------------


def pass_at_k(task: str, runs: Sequence[RunRecord]) -> Figure:
    """A panel for each evaluated run, before and after; of several runs, one more with all of them
    after. A run has its colour also where others were not evaluated."""
    together = len(runs) > 1
    keys = run_keys(runs) or [Key("pass@k", STUDENT)]
    evaluated = [
        (run.evaluations[task], key)
        for run, key in zip(runs, keys, strict=True)
        if task in run.evaluations
    ]
    figure, axes = grid(len(evaluated) + together, keys=[k for _, k in evaluated if together])
    for own, (evaluations, key) in zip(axes, evaluated, strict=False):
        _before_and_after(own, evaluations, key.colour)
        label_panel(own, key.label, "share of problems")
        handles, labels = legend_of(_ending_keys(evaluations, key.colour))
        own.legend(handles, labels, loc="lower right")
    if together:
        for evaluations, key in evaluated:
            _draw_pass(axes[-1], evaluations[-1].report, key)
        label_panel(axes[-1], "all, last evaluation", "share of problems")
    ks = sorted({k for found, _ in evaluated for each in found for k in _ks(each.report)})
    top = max(own.get_ylim()[1] for own in axes)
    for own in axes:
        own.set_ylim(0, top)
        _k_axis(own, ks)
    return figure


def _ending_keys(evaluations: Sequence[Evaluated], colour: str) -> list[Key]:
    """Of the first evaluation and the last, or of the only one."""
    keys = [Key(f"iteration {evaluations[-1].iteration}", colour, AFTER)]
    if len(evaluations) > 1:
        keys.insert(0, Key(f"iteration {evaluations[0].iteration}", GREY, BEFORE))
    return keys


def _before_and_after(axes: Axes, evaluations: Sequence[Evaluated], colour: str) -> None:
    keys = _ending_keys(evaluations, colour)
    for n, ((_, report), key) in enumerate(zip(evaluations, keys, strict=True)):
        # Beside each other, so that neither interval hides the other.
        _draw_pass(axes, report, key, shift=1.04 ** (2 * n - 1) if len(keys) > 1 else 1.0)


def _ks(report: Report) -> list[int]:
    found = [re.fullmatch(r"pass@(\d+)", name) for name in report.figures]
    return sorted(int(match[1]) for match in found if match)


def _draw_pass(axes: Axes, report: Report, key: Key, *, shift: float = 1.0) -> None:
    ks = _ks(report)
    values = np.array([report.figures[f"pass@{k}"] for k in ks])
    ends = [report.intervals.get(f"pass@{k}", (v, v)) for k, v in zip(ks, values, strict=True)]
    low, high = np.array(ends).T
    axes.errorbar(
        np.array(ks) * shift,
        values,
        # The interval of a mean that is at its edge may end within rounding of it.
        yerr=[np.maximum(values - low, 0), np.maximum(high - values, 0)],
        color=key.colour,
        linestyle=key.style,
        marker="o",
        markersize=3.5,
        capsize=2.5,
        elinewidth=0.9,
        label=key.label,
    )


def _k_axis(axes: Axes, ks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("k")


# --- along a response ---------------------------------------------------------------------------


def along_response(task: str, runs: Sequence[RunRecord], curve: str, unit: str) -> Figure | None:
    """A panel for each run, teacher against student; None where no teacher was asked."""
    names = {f"teacher_{curve}": TEACHER, f"student_{curve}": STUDENT}
    measured = [
        run
        for run in runs
        if any(names.keys() & each.report.curves.keys() for each in run.evaluations[task])
    ]
    if not measured:
        return None
    keys = [Key("teacher", TEACHER), Key("student", STUDENT)]
    figure, all_axes = grid(len(measured), keys=keys)
    for axes, run in zip(all_axes, measured, strict=True):
        evaluations = run.evaluations[task]
        for (iteration, report), end in zip(
            evaluations, (BEFORE, AFTER)[-len(evaluations) :], strict=True
        ):
            for name, colour in names.items():
                values = report.curves.get(name, ())
                who = name.partition("_")[0]
                _draw_along(axes, values, Key(f"{who}, iteration {iteration}", colour, end))
        threshold = run.option("objective.entropy_threshold")
        if curve == "entropy" and threshold is not None and threshold <= 1.3 * axes.get_ylim()[1]:
            axes.axhline(threshold, color=GREY, linestyle=":", linewidth=1)
            axes.annotate(f"τ = {threshold:g}", (100, threshold), ha="right", va="bottom")
        ends = " (dashed) and ".join(f"{each.iteration}" for each in evaluations)
        label_panel(axes, run.label if len(runs) > 1 else f"iteration {ends}", unit)
    top = max(axes.get_ylim()[1] for axes in all_axes)
    for axes in all_axes:
        axes.set_ylim(0, top)
        axes.set_xlim(0, 100)
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.set_xlabel("of the response")
    return figure


def _draw_along(axes: Axes, values: Sequence[float | None], key: Key) -> None:
    """Each at the middle of its part; a gap where no token was."""
    known = np.array([np.nan if value is None else value for value in values])
    middles = (np.arange(len(known)) + 0.5) * 100 / max(len(known), 1)
    axes.plot(
        middles,
        known,
        color=key.colour,
        linestyle=key.style,
        marker="o",
        markersize=2.5,
        label=key.label,
    )
