"""What an evaluation of one task found. In: outcomes, sums over tokens. Out: TASK.json, and
report.md of all tasks in its directory.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eopd.config import EvaluationConfig
from megatron_eopd.evaluation.estimators import Outcome, highest, per_problem
from megatron_eopd.evaluation.intervals import intervals
from megatron_eopd.evaluation.problems import ProblemSet
from megatron_eopd.evaluation.report_text import report_markdown
from megatron_eopd.evaluation.reports import (
    BOUNDS,
    ProblemReport,
    Report,
    Settings,
    read_reports,
)
from megatron_eopd.metrics.means import Sums, divide
from megatron_eopd.training.token_metrics import NUM_POSITIONS

REPORTED_K = (1, 4, 8, 16, 32, 64)
DIVERGENCES = {
    "reverse_kl": "loss/reverse_kl",
    "forward_kl": "loss/forward_kl",
    "teacher_entropy": "entropy/teacher_mean",
    "student_entropy": "entropy/student_mean",
    "entropy_gap": "entropy/gap",
    "top_k_overlap": "overlap/top_k",
    "overlap_teacher_mass": "overlap/teacher_mass",
    "overlap_student_mass": "overlap/student_mass",
    "teacher_above_threshold": "above/teacher",
    "student_above_threshold": "above/student",
}
"""Figure → its mean over response tokens."""


def make_report(
    problems: ProblemSet,
    outcomes: Sequence[Outcome],
    sums: Sequence[Sums],
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    options: EvaluationConfig,
) -> Report:
    """`sums`: over tokens; empty where nothing was measured."""
    n = options.samples_per_problem
    values = per_problem(outcomes, [k for k in REPORTED_K if k <= n])
    limits = {name: highest(name, settings["max_response_length"]) for name in values}
    found = intervals(values, limits, seed=options.seed, num_draws=options.bootstrap_draws)
    means = divide(sums)
    figures = {name: float(np.nanmean(each)) for name, each in values.items()}
    figures |= {name: means[mean] for name, mean in DIVERGENCES.items() if mean in means}
    return Report(
        format=1,
        task=problems.name,
        model=dict(model),
        settings=Settings(**settings),
        figures=figures,
        intervals=found,
        curves=_curves(means),
        problems=tuple(
            ProblemReport(id=_identity(problem.text, problem.answer), **outcome._asdict())
            for problem, outcome in zip(problems.problems, outcomes, strict=True)
        ),
    )


def names_of_figures(samples_per_problem: int) -> set[str]:
    """All that an evaluation may have, of one task."""
    n = samples_per_problem
    outcome = Outcome(("right",) * n, ("x",) * n, (True,) * n, (1,) * n, (False,) * n, num_right=1)
    return {*per_problem([outcome], [k for k in REPORTED_K if k <= n]), *DIVERGENCES, *BOUNDS}


def _curves(means: Mapping[str, float]) -> dict[str, list[float | None]]:
    """Over equal parts of a response, the first one first; None where no token was."""
    curves = {}
    for kind, name in (("entropy_at", "entropy"), ("above_at", "above_threshold")):
        for who in ("teacher", "student"):
            values = [means.get(f"{kind}/{who}/{part}") for part in range(NUM_POSITIONS)]
            if any(value is not None for value in values):
                curves[f"{who}_{name}"] = values
    return curves


def _identity(text: str, answer: str) -> str:
    return hashlib.sha256(f"{text}\0{answer}".encode()).hexdigest()[:16]


def write_report(report: Report, directory: Path) -> None:
    """And report.md, of all that the directory has."""
    path = directory / f"{report.task}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(report.model_dump_json(indent=1) + "\n")
    unfinished.replace(path)
    texts = [report_markdown(each) for each in read_reports(directory).values()]
    (directory / "report.md").write_text("# Evaluation\n\n" + "\n\n".join(texts) + "\n")
