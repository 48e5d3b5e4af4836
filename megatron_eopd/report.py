"""An iteration as named scalars, a step line, and the run's report. Pure functions of records."""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_eopd.config import Config
from megatron_eopd.data.packing import PackedRollouts, load_imbalance, padding_fraction
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.metrics import divide, percentile
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import Rollout, StepReport
from megatron_eopd.rollout.engine import SyncReport
from megatron_eopd.run_log import StageTimes


def iteration_scalars(
    rollouts: Sequence[Rollout],
    reports: Sequence[StepReport],
    sync: SyncReport,
    times: StageTimes,
) -> dict[str, float]:
    """Everything that metrics.jsonl and TensorBoard show of one training iteration."""
    teacher_entropy = histograms(reports)["entropy/teacher"]
    mismatch = reports[0].values["mismatch/logprob_abs"]
    scalars = divide(report.sums for report in reports)
    scalars |= {
        "entropy/teacher_p50": percentile(teacher_entropy, 0.5),
        "entropy/teacher_p90": percentile(teacher_entropy, 0.9),
        "mismatch/logprob_abs_p99": percentile(mismatch, 0.99),
        "optim/grad_norm": sum(r.grad_norm for r in reports) / len(reports),
        "optim/lr": reports[-1].lr,
        "weight_sync/seconds": sync.seconds,
        "weight_sync/bytes": sync.num_bytes,
        "weight_sync/version": sync.version,
    }
    scalars |= _rollout_scalars(rollouts) | _memory_scalars()
    scalars |= {f"time/{stage}": seconds for stage, seconds in times.seconds.items()}
    scalars["time/total"] = times.total
    num_tokens = sum(len(r.response_ids) for r in rollouts)
    scalars["throughput/tokens_per_s"] = num_tokens / times.total
    return scalars


def packing_scalars(plans: Sequence[PackedRollouts], layout: Layout) -> dict[str, float]:
    """Waste of the optimizer steps' plans; the same on every rank."""
    count = len(plans)
    return {
        "packing/padding_fraction": sum(padding_fraction(p, layout) for p in plans) / count,
        "packing/load_imbalance": sum(load_imbalance(p) for p in plans) / count,
        "packing/microbatches": sum(len(p[0]) for p in plans) / count,
    }


def histograms(reports: Sequence[StepReport]) -> dict[str, list[float]]:
    """Per-token entropies of all steps of an iteration."""
    names = ("entropy/teacher", "entropy/student")
    return {name: [x for report in reports for x in report.values[name]] for name in names}


def _rollout_scalars(rollouts: Sequence[Rollout]) -> dict[str, float]:
    count = len(rollouts)
    return {
        "rollout/length_mean": sum(len(r.response_ids) for r in rollouts) / count,
        "rollout/truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / count,
        "rollout/repetition": sum(_repetition(r.response_ids) for r in rollouts) / count,
    }


def _repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of 4-grams that occurred earlier in the same response."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _memory_scalars() -> dict[str, float]:
    if torch.cuda.is_available():
        return {"memory/cuda_peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def step_line(iteration: int, scalars: dict[str, float]) -> str:
    """`step 120 | loss 0.4312 | rev_kl 0.38 | …`, what to watch first."""

    def seconds(stage: str) -> str:
        return f"{stage} {scalars.get(f'time/{stage}', 0):.1f}"

    stages = " ".join(seconds(stage) for stage in ("rollout", "score", "train", "sync"))
    return (
        f"step {iteration} | loss {scalars['loss/total']:.4f} | "
        f"rev_kl {scalars['loss/reverse_kl']:.3f} | gate {scalars['gate/fraction']:.3f} | "
        f"teacher_H {scalars['entropy/teacher_mean']:.3f} | "
        f"student_H {scalars['entropy/student_mean']:.3f} | "
        f"len {scalars['rollout/length_mean']:.1f} | "
        f"mismatch {scalars['mismatch/logprob_abs_mean']:.1e} | "
        f"gnorm {scalars['optim/grad_norm']:.2f} | "
        f"tok/s {scalars['throughput/tokens_per_s']:.0f} | "
        f"{scalars['time/total']:.1f} s ({stages})"
    )


def samples_markdown(rollouts: Sequence[Rollout], tokenizer: Tokenizer) -> str:
    """Prompts and responses as text, for TensorBoard."""
    return "\n\n".join(
        f"**{r.prompt.text}** → {tokenizer.decode(r.response_ids)} _({r.finish_reason})_"
        for r in rollouts
    )


def before_after_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: every evaluation figure at the first and at the last evaluation of the run."""
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    if not evaluations:
        return "No evaluation was configured (evaluation.task)."
    before, after = evaluations[0], evaluations[-1]
    lines = [
        f"| held-out figure | before (iteration {before['iteration']}) | "
        f"after (iteration {after['iteration']}) | change |",
        "|---|---|---|---|",
    ]
    for name in (n for n in before if n.startswith("eval/")):
        old, new = before[name], after.get(name, float("nan"))
        lines.append(f"| {name.removeprefix('eval/')} | {old:.4f} | {new:.4f} | {new - old:+.4f} |")
    return "\n".join(lines)


def figures_table(figures: dict[str, float]) -> str:
    """Markdown: the figures of one evaluation."""
    rows = [f"| {name.removeprefix('eval/')} | {value:.4f} |" for name, value in figures.items()]
    return "\n".join(["| held-out figure | value |", "|---|---|", *rows])


def write_report(config: Config, table: str, hf_dir: Path | None, minutes: float) -> str:
    """RUN_DIR/report.md; returns its text."""
    run_dir = config.run_dir
    lines = [
        f"# {config.objective.name}: {config.teacher.hf_path} → {config.student.hf_path}",
        "",
        table,
        "",
        f"- run: {run_dir} ({config.training.train_iters} iterations, this start took "
        f"{minutes:.1f} min)",
        f"- Hugging Face export: {hf_dir or 'none (checkpoint.export_hf=false)'}",
        # With its path: the environment need not be activated.
        f"- TensorBoard: `{Path(sys.executable).with_name('tensorboard')} --logdir "
        f"{run_dir / 'tensorboard'}`",
    ]
    text = "\n".join(lines) + "\n"
    (run_dir / "report.md").write_text(text)
    return text
