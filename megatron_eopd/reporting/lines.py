"""What a person reads on the terminal while a run goes on. In: named scalars. Out: a line."""

import math
from collections.abc import Mapping

from megatron_eopd.evaluation.report_file import BOUNDS


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


def evaluation_line(task: str, figures: Mapping[str, float]) -> str:
    """`countdown | pass@1 0.210 | …`: what a person looks at while a run goes on."""
    shown = [name for name in figures if name.startswith(_WATCHED) and not name.endswith(BOUNDS)]
    return " | ".join([task, *(f"{name} {figures[name]:.3f}" for name in shown)])


_WATCHED = ("pass@", "avg@", "maj@", "distinct_correct", "truncated", "reverse_kl", "forward_kl")
