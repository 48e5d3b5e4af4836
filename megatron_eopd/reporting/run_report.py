"""RUN_DIR/report.md, what a run has come to. In: rows of metrics.jsonl. Out: the file."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eopd.config import Config
from megatron_eopd.evaluation.report_file import BOUNDS


def before_after_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: every evaluation figure at the first and at the last evaluation of the run."""
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    if not evaluations:
        return "No evaluation was configured (evaluation.tasks)."
    before, after = evaluations[0], evaluations[-1]
    lines = [
        f"| held-out figure | before (iteration {before['iteration']}) | "
        f"after (iteration {after['iteration']}) | change |",
        "|---|---|---|---|",
    ]
    for name in (n for n in before if n.startswith("eval/") and not n.endswith(BOUNDS)):
        old, new = before[name], after.get(name, float("nan"))
        shown = [_with_interval(name, row) for row in (before, after)]
        label = name.removeprefix("eval/")
        lines.append(f"| {label} | {shown[0]} | {shown[1]} | {new - old:+.4f} |")
    return "\n".join(lines)


def _with_interval(name: str, figures: dict[str, Any]) -> str:
    """The mean accuracy with its 95 % interval, every other figure alone."""
    task, _, figure = name.rpartition("/")
    shown = f"{figures.get(name, math.nan):.4f}"
    low = figures.get(f"{task}/accuracy_low")
    if figure.startswith("avg@") and low is not None:
        shown += f" ({low:.4f} to {figures[f'{task}/accuracy_high']:.4f})"
    return shown


def write_report(config: Config, table: str, hf_dir: Path | None, minutes: float) -> str:
    """RUN_DIR/report.md; returns its text."""
    run_dir = config.run_dir
    lines = [
        f"# {config.objective.name}: {config.teacher.hf_path} → {config.student.hf_path}",
        "",
        table,
        "",
        f"- run: {run_dir} ({config.training.train_iters} iterations; this command took "
        f"{minutes:.1f} min from its start)",
        f"- Hugging Face export: {hf_dir or 'none (checkpoint.export_hf=false)'}",
    ]
    if "tensorboard" in config.logging.trackers:
        # With its path: the environment need not be activated.
        command = Path(sys.executable).with_name("tensorboard")
        lines.append(f"- TensorBoard: `{command} --logdir {run_dir / 'tensorboard'}`")
    text = "\n".join(lines) + "\n"
    (run_dir / "report.md").write_text(text)
    return text
