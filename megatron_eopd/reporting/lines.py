"""What a person reads on the terminal while a run goes on. In: named scalars. Out: a line."""

import math
from collections.abc import Mapping

from megatron_eopd.evaluation.reports import BOUNDS

WIDTH = 100
"""Columns."""


def step_line(
    iteration: int, total: int, scalars: Mapping[str, float], remaining_s: float | None
) -> str:
    """`step 120/200 | loss 0.4312 | rev_kl 0.380 | …`, what to watch first, in at most WIDTH
    columns: what does not fit is left out, the least needed first. metrics.jsonl has all of it."""
    parts = [part for part in _parts(iteration, total, scalars, remaining_s) if part is not None]
    while len(line := " | ".join(text for _, text in parts)) > WIDTH:
        parts.remove(max(parts, key=lambda part: part[0]))
    return line


Part = tuple[int, str]
"""(how soon it may go: the largest first, text)"""


def _parts(
    iteration: int, total: int, scalars: Mapping[str, float], remaining_s: float | None
) -> list[Part | None]:
    def named(rank: int, label: str, name: str, form: str, unit: str = "") -> Part | None:
        value = scalars.get(name, math.nan)
        return None if math.isnan(value) else (rank, f"{label}{value:{form}}{unit}")

    entropies = [scalars.get(f"entropy/{who}_mean") for who in ("teacher", "student")]
    known = None not in entropies
    references, skipped = scalars["rollout/reference_fraction"], scalars["optim/skipped_steps"]
    return [
        (0, f"step {iteration}/{total}"),
        named(0, "loss ", "loss/total", ".4f"),
        named(1, "rev_kl ", "loss/reverse_kl", ".3f"),
        named(1, "gate ", "gate/fraction", ".2f"),
        (3, "H {:.2f}/{:.2f}".format(*entropies)) if known else None,
        (1, f"references {references:.0%}") if references else None,
        (0, f"skipped {skipped:.0f}") if skipped else None,
        named(2, "len ", "rollout/length_mean", ".0f"),
        named(4, "", "throughput/tokens_per_s", ".0f", " tok/s"),
        named(2, "", "time/total", ".1f", " s"),
        None if remaining_s is None else (0, f"ETA {_clock(remaining_s)}"),
    ]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def evaluation_line(task: str, figures: Mapping[str, float]) -> str:
    """`countdown | pass@1 0.210 | …`: what a person looks at while a run goes on."""
    shown = [name for name in figures if name.startswith(_WATCHED) and not name.endswith(BOUNDS)]
    return " | ".join([task, *(f"{name} {figures[name]:.3f}" for name in shown)])


_WATCHED = ("pass@", "avg@", "maj@", "distinct_correct", "truncated", "reverse_kl", "forward_kl")
