"""Reports of evaluations, read back. In: TASK.json, or a directory of them. Out: Reports.

A report holds what became of every sample, so that figures can be paired problem by problem.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.estimators import Outcome
from megatron_eopd.tasks.task import Verdict

BOUNDS = ("accuracy_low", "accuracy_high")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Settings(_Record, extra="allow"):
    """How the samples were drawn and graded: these, and whatever else was told."""

    num_samples: int
    """Of each problem."""
    temperature: float
    top_p: float
    max_response_length: int
    seed: int
    chat_template: str
    """Digest."""
    tokenizer: str
    """Digest."""
    prompts: str
    """Digest of the problems' texts and answers."""
    graders: dict[str, str]
    """Name → version."""
    num_problems: int


class ProblemReport(_Record):
    """As `Outcome`."""

    id: str
    verdicts: tuple[Verdict, ...]
    canonical: tuple[str, ...]
    second: tuple[bool | None, ...]
    lengths: tuple[int, ...]
    cut: tuple[bool, ...]
    num_right: int | None = None

    @property
    def outcome(self) -> Outcome:
        return Outcome(*(getattr(self, field) for field in Outcome._fields))


class Report(_Record):
    format: Literal[1]
    task: str
    model: dict[str, Any]
    """Whatever tells the weights."""
    settings: Settings
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    curves: dict[str, list[float | None]] = {}
    """Means over equal parts of a response, the first one first; None where there was no token."""
    problems: tuple[ProblemReport, ...]

    @property
    def outcomes(self) -> list[Outcome]:
        return [problem.outcome for problem in self.problems]

    @model_validator(mode="after")
    def _is_whole(self) -> "Report":
        wanted = (self.settings.num_problems, {self.settings.num_samples})
        counts = {len(entries) for outcome in self.outcomes for entries in outcome[:-1]}
        if (len(self.problems), counts) != wanted:
            raise ValueError(
                f"{len(self.problems)} problems with {sorted(counts)} samples, where its settings "
                f"say {self.settings.num_problems} with {self.settings.num_samples}"
            )
        return self


def scalars_of(report: Report) -> dict[str, float]:
    """What curves over a run show: the figures, and the interval of the mean accuracy."""
    low, high = report.intervals[f"avg@{report.settings.num_samples}"]
    return report.figures | dict(zip(BOUNDS, (low, high), strict=True))


def read_report(path: Path) -> Report:
    """
    Raises:
        ConfigError: no such file, or not a whole report of this format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        return Report.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        found = f"{place}: {first['msg']}" if place else first["msg"]
        raise ConfigError(
            f"{path}: not the whole report of an evaluation ({found}). Name a TASK.json as an "
            f"evaluation wrote it, or evaluate again."
        ) from None


def _is_report(path: Path) -> bool:
    """Or damaged, which is told; not a file of something else beside it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return True
    return isinstance(found, dict) and "task" in found


def read_reports(path: Path) -> dict[str, Report]:
    """Task → report, of a file or of all in a directory.

    Raises:
        ConfigError: as `read_report`, or nothing there.
    """
    paths = list(filter(_is_report, sorted(path.glob("*.json")))) if path.is_dir() else [path]
    if not paths:
        raise ConfigError(f"{path}: holds no TASK.json. Name what an evaluation wrote into.")
    reports: dict[str, Report] = {}
    for own in paths:
        report = read_report(own)
        if report.task in reports:
            raise ConfigError(f"{path}: holds two reports of {report.task}. Name one file.")
        reports[report.task] = report
    return reports
