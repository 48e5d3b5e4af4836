"""An iteration as named scalars, a step line, and the run's report. In: records.

Pure functions, but for the peaks of memory, of which all ranks tell.
"""

import math
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eopd.config import Config
from megatron_eopd.data.packing import PackedRollouts, load_imbalance, padding_fraction
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.metrics.histogram import merge, percentile
from megatron_eopd.metrics.means import divide
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import Histogram, Rollout, StepReport
from megatron_eopd.rollout.engine import SyncReport
from megatron_eopd.run_log import StageTimes


def iteration_scalars(
    rollouts: Sequence[Rollout],
    reports: Sequence[StepReport],
    sync: SyncReport,
    times: StageTimes,
    memory: Mapping[str, float],
) -> dict[str, float]:
    """Everything that metrics.jsonl and the trackers show of one training iteration; `memory`: as
    memory_scalars has it."""
    scalars = divide(report.sums for report in reports) | percentiles(reports)
    scalars |= {
        "optim/grad_norm": _finite_mean([r.grad_norm for r in reports]),
        "optim/skipped_steps": sum(r.fault is not None for r in reports),
        "optim/lr": reports[-1].lr,
        "weight_sync/seconds": sync.seconds,
        "weight_sync/bytes": sync.num_bytes,
        "weight_sync/version": sync.version,
        **{f"weight_sync/{part}_s": seconds for part, seconds in sync.parts.items()},
        "weight_sync/probe_difference": sync.probe.difference if sync.probe else math.nan,
    }
    scalars |= _rollout_scalars(rollouts) | memory
    scalars |= {f"time/{stage}": seconds for stage, seconds in times.seconds.items()}
    scalars["time/total"] = times.total
    scalars["throughput/tokens_per_s"] = num_tokens(rollouts) / times.total
    return scalars


def _finite_mean(values: Sequence[float]) -> float:
    """Over those that are finite; NaN of none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def num_tokens(rollouts: Sequence[Rollout]) -> int:
    """Of all responses."""
    return sum(len(r.response_ids) for r in rollouts)


def packing_scalars(plans: Sequence[PackedRollouts], layout: Layout) -> dict[str, float]:
    """Waste of the optimizer steps' plans; the same on every rank."""
    count = len(plans)
    return {
        "packing/padding_fraction": sum(padding_fraction(p, layout) for p in plans) / count,
        "packing/load_imbalance": sum(load_imbalance(p) for p in plans) / count,
        "packing/microbatches": sum(len(p[0]) for p in plans) / count,
    }


def histograms(reports: Sequence[StepReport]) -> dict[str, Histogram]:
    """Of the entropies at all tokens of an iteration, its sound steps together."""
    found = {}
    for name in ("entropy/teacher", "entropy/student"):
        steps = [r.histograms[name] for r in reports if name in r.histograms]
        if steps:
            found[name] = merge(steps)
    return found


def percentiles(reports: Sequence[StepReport]) -> dict[str, float]:
    """Those that metrics.jsonl has; where no step was sound, none."""
    scalars = {}
    if (entropies := histograms(reports).get("entropy/teacher")) is not None:
        scalars["entropy/teacher_p50"] = percentile(entropies, 0.5)
        scalars["entropy/teacher_p90"] = percentile(entropies, 0.9)
    # Of the first step alone, in which the student has the engine's weights.
    if (mismatch := reports[0].histograms.get("mismatch/logprob_abs")) is not None:
        scalars["mismatch/logprob_abs_p99"] = percentile(mismatch, 0.99)
    return scalars


def _rollout_scalars(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of the student's samples; of reference answers under a name of their own."""
    sampled = [r for r in rollouts if r.source == "sampled"]
    references = [r for r in rollouts if r.source == "reference"]
    scalars = {"rollout/reference_fraction": len(references) / len(rollouts)}
    if references:
        scalars["reference/length_mean"] = num_tokens(references) / len(references)
    if sampled:
        count = len(sampled)
        cut = sum(r.finish_reason == "length" for r in sampled)
        scalars |= {
            "rollout/length_mean": num_tokens(sampled) / count,
            "rollout/truncated_fraction": cut / count,
            "rollout/repetition": sum(_repetition(r.response_ids) for r in sampled) / count,
        }
    return scalars


def _repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of 4-grams that occurred earlier in the same response."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def memory_scalars(peaks: Mapping[str, int], context: ParallelContext) -> dict[str, float]:
    """Of the rank that has most, each: one all-reduce of a few numbers. `peaks`: of StageTimes."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    stages = sorted(stage for stage in peaks if stage)
    own = [host, max(peaks.values(), default=0), *(peaks[stage] for stage in stages)]
    most = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=context.cpu_group)
    names = ["memory/host_peak_gib", "memory/cuda_peak_gib"]
    names += [f"memory/cuda_peak_gib/{stage}" for stage in stages]
    scalars = dict(zip(names, (most / 2**30).tolist(), strict=True))
    return scalars if context.device.type == "cuda" else {names[0]: scalars[names[0]]}


def step_line(
    iteration: int, total: int, scalars: dict[str, float], remaining_s: float | None
) -> str:
    """`step 120/200 | loss 0.4312 | rev_kl 0.38 | …`, what to watch first."""

    def seconds(stage: str) -> str:
        return f"{stage} {scalars.get(f'time/{stage}', 0):.1f}"

    def named(label: str, name: str, form: str) -> list[str]:
        value = scalars.get(name, math.nan)
        return [f"{label} {value:{form}}"] if value == value else []

    stages = " ".join(seconds(stage) for stage in ("rollout", "score", "train", "sync"))
    memory = scalars.get("memory/cuda_peak_gib", scalars.get("memory/host_peak_gib", math.nan))
    references = scalars["rollout/reference_fraction"]
    skipped = scalars["optim/skipped_steps"]
    parts = [
        f"step {iteration}/{total}",
        *named("loss", "loss/total", ".4f"),
        *named("rev_kl", "loss/reverse_kl", ".3f"),
        *named("gate", "gate/fraction", ".3f"),
        *named("teacher_H", "entropy/teacher_mean", ".3f"),
        *named("student_H", "entropy/student_mean", ".3f"),
        *([f"references {references:.0%}"] if references else []),
        *named("len", "rollout/length_mean", ".1f"),
        *named("mismatch", "mismatch/logprob_abs_mean", ".1e"),
        *named("gnorm", "optim/grad_norm", ".2f"),
        *([f"skipped {skipped}"] if skipped else []),
        f"tokens {scalars['throughput/tokens_total']:,.0f}",
        f"tok/s {scalars['throughput/tokens_per_s']:.0f}",
        f"{memory:.1f} GiB",
        f"{scalars['time/total']:.1f} s ({stages})",
    ]
    if remaining_s is not None:
        parts.append(f"ETA {_clock(remaining_s)}")
    return " | ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def samples_markdown(
    rollouts: Sequence[Rollout], tokenizer: Tokenizer, correct: Sequence[bool] | None = None
) -> str:
    """Prompts and responses as text for the trackers, with what a reader judges them by; `correct`:
    marks, where they were graded."""
    parts = []
    for n, rollout in enumerate(rollouts):
        ending = {"stop": "ended", "length": "cut"}[rollout.finish_reason]
        facts = [f"{len(rollout.response_ids)} tokens, {ending}"]
        if rollout.source == "reference":
            facts.append("a reference answer, not the student's")
        if rollout.prompt.answer:
            facts.append(f"answer: {escape_markdown(rollout.prompt.answer)}")
        if correct is not None:
            facts.append("right" if correct[n] else "wrong")
        text = escape_markdown(tokenizer.decode(rollout.response_ids))
        parts.append(
            f"**{escape_markdown(rollout.prompt.text)}**\n\n{text}\n\n_({'; '.join(facts)})_"
        )
    return "\n\n---\n\n".join(parts)


_SPECIAL = re.compile(r"[\\`*_{}\[\]()<>#+\-.!|~=^:&$]|^ +", re.MULTILINE)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: `3*4*5` is no emphasis, `# 18` no heading, `|` no table,
    and lines end where they end."""
    # Entities: TensorBoard's Markdown takes a backslash before some of these only.
    escaped = _SPECIAL.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), text)
    return escaped.replace("\n", "  \n")


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
    for name in (n for n in before if n.startswith("eval/") and not _is_bound(n)):
        old, new = before[name], after.get(name, float("nan"))
        shown = [_with_interval(name, row) for row in (before, after)]
        label = name.removeprefix("eval/")
        lines.append(f"| {label} | {shown[0]} | {shown[1]} | {new - old:+.4f} |")
    return "\n".join(lines)


def _is_bound(name: str) -> bool:
    return name.endswith(("accuracy_low", "accuracy_high"))


def _with_interval(name: str, figures: dict[str, Any]) -> str:
    """The mean accuracy with its 95 % interval, every other figure alone."""
    task, _, figure = name.rpartition("/")
    shown = f"{figures.get(name, math.nan):.4f}"
    low = figures.get(f"{task}/accuracy_low")
    if figure.startswith("avg@") and low is not None:
        shown += f" ({low:.4f} to {figures[f'{task}/accuracy_high']:.4f})"
    return shown


def evaluation_line(task: str, figures: Mapping[str, float]) -> str:
    """`countdown | pass@1 0.210 | …`: what a person looks at while a run goes on."""
    shown = [name for name in figures if name.startswith(_WATCHED) and not _is_bound(name)]
    return " | ".join([task, *(f"{name} {figures[name]:.3f}" for name in shown)])


_WATCHED = ("pass@", "avg@", "maj@", "distinct_correct", "truncated", "reverse_kl", "forward_kl")


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
