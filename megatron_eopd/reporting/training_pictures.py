"""Pictures of the training: loss, entropy, gate, responses, optimizer, engine, speed. In:
RunRecords. Out: Figures with captions.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_eopd.reporting.curves import (
    NATS,
    Curve,
    Drawn,
    Panel,
    draw_panel,
    over_iterations,
    run_keys,
)
from megatron_eopd.reporting.drawing import (
    Key,
    colours,
    grid,
    label_panel,
    style,
    thin,
    whole_ticks,
)
from megatron_eopd.reporting.run_records import Row, RunRecord


def _by_gate(name: str) -> tuple[Curve, ...]:
    return (
        Curve("all tokens", f"loss/{name}"),
        Curve("gate open", f"loss/{name}_gated"),
        Curve("gate closed", f"loss/{name}_ungated"),
    )


TRAINING = {
    "loss": (
        "Loss: the objective, and its two divergences over all tokens, over those at which the "
        "gate is open, and over the rest.",
        (
            Panel("objective", NATS, (Curve("total", "loss/total"),)),
            Panel("reverse KL(student ‖ teacher)", NATS, _by_gate("reverse_kl")),
            Panel("forward KL(teacher ‖ student)", NATS, _by_gate("forward_kl")),
        ),
    ),
    "entropy": (
        "Entropy of both models at the student's tokens, and the share of tokens at which the "
        "gate is open.",
        (
            Panel(
                "mean entropy",
                NATS,
                (
                    Curve("teacher", "entropy/teacher_mean"),
                    Curve("student", "entropy/student_mean"),
                    Curve("student, gate open", "entropy/student_gated"),
                ),
            ),
            Panel(
                "percentiles of entropy",
                NATS,
                (
                    Curve("teacher p50", "entropy/teacher_p50"),
                    Curve("teacher p90", "entropy/teacher_p90"),
                    Curve("student p50", "entropy/student_p50"),
                    Curve("student p90", "entropy/student_p90"),
                ),
            ),
            Panel("gate", "share of tokens", (Curve("open", "gate/fraction"),), from_zero=True),
        ),
    ),
    "responses": (
        "Responses: their length, the share that was cut at the longest length, the share of "
        "4-grams that repeat an earlier one, and the log-probability that each model gives to the "
        "end where the student wrote it.",
        (
            Panel("length", "tokens", (Curve("mean", "rollout/length_mean"),)),
            Panel(
                "cut",
                "share of responses",
                (Curve("cut", "rollout/truncated_fraction"),),
                from_zero=True,
            ),
            Panel(
                "repetition",
                "share of 4-grams",
                (Curve("repeated", "rollout/repetition"),),
                from_zero=True,
            ),
            Panel(
                "log-probability of the end",
                NATS,
                (
                    Curve("teacher", "end/teacher_logprob"),
                    Curve("student", "end/student_logprob"),
                ),
            ),
        ),
    ),
    "optimizer": (
        "Optimizer: gradient norm before clipping, learning rate, and, if any, steps that were "
        "left out.",
        (
            Panel("gradient norm", "", (Curve("norm", "optim/grad_norm"),), is_log=True),
            Panel("learning rate", "", (Curve("lr", "optim/lr"),)),
            Panel(
                "skipped steps",
                "steps",
                (Curve("skipped", "optim/skipped_steps"),),
                from_zero=True,
                if_any=True,
            ),
        ),
    ),
    "mismatch": (
        "Engine against trainer: how far their log-probabilities of the same tokens are apart, of "
        "sampled tokens and, after each weight sync, of likely ones.",
        (
            Panel(
                "|Δ log-probability|, sampled",
                NATS,
                (
                    Curve("mean", "mismatch/logprob_abs_mean"),
                    Curve("p99", "mismatch/logprob_abs_p99"),
                ),
                is_log=True,
            ),
            Panel(
                "mean of exp |Δ|, less 1",
                "",
                (Curve("", "mismatch/mult_prob_error", minus=1.0),),
                is_log=True,
            ),
            Panel(
                "|Δ| after the weight sync",
                NATS,
                (Curve("", "weight_sync/probe_difference"),),
                is_log=True,
            ),
        ),
    ),
}
"""Name → (caption, panels), in the report's order."""


def training_pictures(runs: Sequence[RunRecord]) -> Iterator[Drawn]:
    """Without what no run has."""
    with style():
        for name, (caption, panels) in TRAINING.items():
            figure = over_iterations(panels, runs, _rows)
            if figure is not None:
                yield Drawn(name, caption, figure)
        if any(map(_timed, runs)):
            yield Drawn("speed", SPEED, speed(runs))


def _rows(run: RunRecord) -> list[Row]:
    return run.training_rows


# --- time ---------------------------------------------------------------------------------------

SPEED = (
    "Speed: response tokens by the seconds of the whole iteration, and where its seconds went, "
    "stage upon stage."
)
THROUGHPUT = Panel("throughput", "tokens / s", (Curve("", "throughput/tokens_per_s"),))
MOST_LAYERED = 150
"""Points of a stack, whose layers are each drawn along both edges."""
REST = Key("rest", "#b8bec4")
"""Of an iteration's seconds: between its stages."""


def _timed(run: RunRecord) -> list[Row]:
    return [row for row in run.training_rows if "time/total" in row]


def speed(runs: Sequence[RunRecord]) -> Figure:
    """Tokens per second of all runs, then a stack of seconds for each."""
    timed = [run for run in runs if _timed(run)]
    figure, (first, *stacks) = grid(1 + len(timed), keys=run_keys(runs))
    draw_panel(first, THROUGHPUT, runs, _rows)
    for axes, run in zip(stacks, timed, strict=True):
        title = f"seconds, {run.label}" if len(runs) > 1 else "seconds of an iteration"
        _stack_stages(axes, _timed(run))
        label_panel(axes, title, "s")
    top = max(axes.get_ylim()[1] for axes in stacks)
    for axes in stacks:
        axes.set_ylim(0, top)
    return figure


def _stack_stages(axes: Axes, rows: Sequence[Row]) -> None:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("time/"))
    del names["time/total"]
    stages = [np.array([row.get(name, 0.0) for row in rows]) for name in names]
    total_N = np.array([row["time/total"] for row in rows])
    stages.append(np.maximum(total_N - sum(stages), 0.0))
    iterations_N = np.array([row["iteration"] for row in rows], dtype=float)
    drawn = [thin(iterations_N, seconds_N, MOST_LAYERED) for seconds_N in stages]
    labels = [*(name.removeprefix("time/") for name in names), REST.label]
    palette = [*colours(len(names)), REST.colour]
    areas = axes.stackplot(
        drawn[0].x_M, [each.mean_M for each in drawn], colors=palette, labels=labels, alpha=0.85
    )
    axes.legend(areas[::-1], labels[::-1], loc="upper right", frameon=True, ncols=2)
    axes.set_ylim(0, 1.45 * max(sum(each.mean_M for each in drawn)))  # room for the legend
    axes.set_xlabel("iteration")
    whole_ticks(axes)
