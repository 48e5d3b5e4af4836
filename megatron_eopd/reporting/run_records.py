"""What run folders hold, for a report. In: run folders, also of runs that go on. Out: RunRecords.

Reads only. What is absent or damaged is said in `missing`, and the rest is used.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from megatron_eopd.checkpoints.files import EVALUATIONS, place_of
from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.reports import Report, read_report, scalars_of
from megatron_eopd.metrics.rows import read_metrics

Row = dict[str, Any]
"""A line of metrics.jsonl: `iteration`, and values by the names of docs/metrics.md."""


class Evaluated(NamedTuple):
    iteration: int
    report: Report


@dataclass(frozen=True)
class RunRecord:
    label: str
    """Printable, and no other run's of the same report."""
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved options; empty where nobody knows them."""
    rows: list[Row] = field(default_factory=list)
    evaluations: dict[str, tuple[Evaluated, ...]] = field(default_factory=dict)
    """Task → its first evaluation and its last one, or the only one."""
    warnings: tuple[str, ...] = ()
    """That rank 0 told."""
    missing: tuple[str, ...] = ()
    """Sentences."""

    def option(self, name: str) -> Any:
        """By section.key; None where it is not known."""
        value: Any = self.config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @cached_property
    def training_rows(self) -> list[Row]:
        return [row for row in self.rows if any(not _is_held_out(name) for name in row)]

    @cached_property
    def evaluation_rows(self) -> list[Row]:
        """In the order of iterations: of metrics.jsonl, and of evaluations that were made by
        themselves."""
        found: dict[int, Row] = {}
        for task, evaluations in self.evaluations.items():
            for iteration, report in evaluations:
                figures = {f"eval/{task}/{n}": v for n, v in scalars_of(report).items()}
                found.setdefault(iteration, {"iteration": iteration}).update(figures)
        for row in self.rows:
            figures = {name: value for name, value in row.items() if name.startswith("eval/")}
            if figures:
                iteration = row["iteration"]
                # What the run itself wrote wins over an evaluation that was made again.
                found[iteration] = found.get(iteration, {}) | {"iteration": iteration} | figures
        return [found[iteration] for iteration in sorted(found)]

    def last(self, metric: str) -> float | None:
        """Its newest value."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)


def _is_held_out(name: str) -> bool:
    return name == "iteration" or name.startswith("eval/")


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """
    Raises:
        ConfigError: not a run folder, or one that is named twice.
    """
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise ConfigError(f"{path}: is named twice. Name each run once.")
    return [
        read_run(path, label) for path, label in zip(paths, unique_labels(resolved), strict=True)
    ]


def unique_labels(paths: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many folders above it as set it apart from the others."""
    labels = [printable("/".join(path.parts[-1:])) for path in paths]
    deepest = max(len(path.parts) for path in paths)
    for depth in range(2, deepest + 1):
        labels = [
            printable("/".join(path.parts[-depth:])) if labels.count(label) > 1 else label
            for path, label in zip(paths, labels, strict=True)
        ]
    # Names may be equal where printable() has replaced what they differ in.
    return [
        f"{label} ({n + 1})" if labels.count(label) > 1 else label for n, label in enumerate(labels)
    ]


def printable(text: str) -> str:
    """Without control characters and what is no character at all, which neither XML nor a terminal
    takes; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def read_run(path: Path, label: str) -> RunRecord:
    """
    Raises:
        ConfigError: not a run folder.
    """
    if not (path / "config.json").is_file() and not (path / "metrics.jsonl").is_file():
        what = "has neither config.json nor metrics.jsonl" if path.is_dir() else "is no folder"
        raise ConfigError(f"{path}: {what}, so it is not a run's. Name the run_dir of a training.")
    missing: list[str] = []
    return RunRecord(
        label,
        path,
        config=_read_config(path / "config.json", missing),
        rows=_read_rows(path / "metrics.jsonl", missing),
        evaluations=_read_evaluations(path, missing),
        warnings=_read_warnings(path / "log" / "rank0.txt"),
        missing=tuple(missing),
    )


def _read_config(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        missing.append(f"{path.name} cannot be read ({error}): models and options are not known.")
        return {}
    return config if isinstance(config, dict) else {}


def _read_rows(path: Path, missing: list[str]) -> list[Row]:
    try:
        found = read_metrics(path)
    except (OSError, ValueError) as error:
        missing.append(f"{path.name} cannot be read ({error}): there are no curves.")
        return []
    rows = [_numbers(row) for row in found if isinstance(row, dict)]
    rows = [row for row in rows if isinstance(row.get("iteration"), int)]
    if not rows:
        missing.append(f"{path.name} has no whole line yet: there are no curves.")
    return rows


def _numbers(row: dict[str, Any]) -> Row:
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def _read_evaluations(run_dir: Path, missing: list[str]) -> dict[str, tuple[Evaluated, ...]]:
    """Only the first and the last of each task are read: each lists every sample."""
    paths: dict[str, list[Path]] = {}
    for directory in sorted((run_dir / EVALUATIONS).glob("[0-9]*")):
        place = place_of(directory)
        if place is None or place[1]:  # within an iteration
            continue
        for path in sorted(directory.glob("*.json")):
            paths.setdefault(path.stem, []).append(path)
    return {task: found for task, own in paths.items() if (found := _first_and_last(own, missing))}


def _first_and_last(paths: list[Path], missing: list[str]) -> tuple[Evaluated, ...]:
    first = _first_readable(paths, missing)
    last = _first_readable(paths[::-1], missing)
    if first is None or last is None or first.iteration == last.iteration:
        return () if first is None else (first,)
    return first, last


def _first_readable(paths: Sequence[Path], missing: list[str]) -> Evaluated | None:
    for path in paths:
        try:
            return Evaluated(place_of(path.parent)[0], read_report(path))
        except ConfigError as error:
            if str(error) not in missing:
                missing.append(str(error))
    return None


_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", re.MULTILINE)


def _read_warnings(path: Path) -> tuple[str, ...]:
    """Each once, without its time, however many lines it has."""
    if not path.is_file():
        return ()
    entries = _STAMP.split(path.read_text(errors="replace"))
    told = [entry.strip() for entry in entries if entry.startswith("WARNING")]
    return tuple(dict.fromkeys(told))
