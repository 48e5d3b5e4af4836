"""What to watch in the first 50 steps, as the trackers and docs/monitoring.md show it."""

from typing import NamedTuple


class Sign(NamedTuple):
    metric: str
    healthy: str
    """With its source in brackets."""
    look: str
    """When something is wrong, and what helps."""


SOURCES = """\
Sources: **[paper]** EOPD's 4B student with an 8B teacher, from the start of training to its end, as
reported; it was not run here. **[here]** runs of this repository on CPU: the toy of the quick
start, and SmolLM2-135M without four layers. **[warns]** a bound at which a run warns by itself.
Other models have other levels: the directions hold."""

SIGNS = (
    Sign(
        "loss/reverse_kl",
        "falls fast, then slowly: 0.38 → 0.06 [paper]; SmolLM2 with `opd`, its first six "
        "iterations, 1.66, 0.87, 0.71, 0.65, 0.60, 0.58 [here]",
        "it rises: lower `training.lr`, or take more samples per optimizer step",
    ),
    Sign(
        "loss/forward_kl_gated",
        "falls, 0.62 → 0.07 [paper]",
        "it stays while reverse KL falls: the student gives up what the teacher also holds "
        "possible",
    ),
    Sign(
        "gate/fraction",
        "0.33 → 0.20 at a threshold of 0.8 nats [paper]",
        "above 0.9 [warns]: the teacher is unsure of all it reads; warm the student up with "
        "`rollout.reference_fraction`",
    ),
    Sign(
        "entropy/teacher_mean",
        "1.26 before training, with a median of 0.034 [paper]; falls or stays, toy 0.181 → 0.175, "
        "SmolLM2 1.43 → 0.77 [here]",
        "it rises: the student's text gets stranger to the teacher",
    ),
    Sign(
        "entropy/student_mean",
        "comes near the teacher's and stays there, toy 0.289 → 0.201 [here]",
        "below a tenth of its first value and of the teacher's [warns]: lower `training.lr` or "
        "`objective.entropy_threshold`",
    ),
    Sign(
        "topk/teacher_mass",
        "0.91 of 16 tokens before training, 0.71 where entropy is high [paper]",
        "far below that: the top k say little of the teacher; take a full-vocabulary objective",
    ),
    Sign(
        "topk/sampled_outside",
        "0.12 of 16 tokens before training, 0.38 where entropy is high [paper]",
        "it does not fall",
    ),
    Sign(
        "end/teacher_logprob",
        "rises towards `end/student_logprob`",
        "tens of nats below it: the teacher ends its answers with another token; see "
        "`teacher.eos_token_map`",
    ),
    Sign(
        "rollout/truncated_fraction",
        "stays or falls, toy 0 throughout [here]",
        "above 0.9 [warns]: no answer ends; look at the stop tokens, or raise "
        "`rollout.max_response_length`",
    ),
    Sign(
        "rollout/repetition",
        "stays or falls",
        "above 0.5 [warns]: the student repeats itself; lower `training.lr`",
    ),
    Sign(
        "mismatch/mult_prob_error",
        "1.001 in float32 and 1.1 in bfloat16 are expected of rounding; 1.15 to 1.35 of flat "
        "distributions in bfloat16, from the first iteration on [here]",
        "its distance from 1 is more than 3 times that of the first iteration [warns]: samples "
        "come from other weights",
    ),
    Sign(
        "weight_sync/probe_difference",
        "the same from sync to sync: float32 4e-7 to 1.2e-5, bfloat16 0.026 to 0.044 [here]",
        "more than 3 times the rounding [warns], and 10 times stops the run",
    ),
    Sign(
        "optim/skipped_steps",
        "0",
        "any: the log says which, and `RUN_DIR/nonfinite` has its batch",
    ),
    Sign(
        "engine/alive",
        "all engines",
        "one less: `RUN_DIR/log` has its last words, and it is started again",
    ),
)


def table() -> str:
    """The signs in Markdown."""
    rows = [f"| `{sign.metric}` | {sign.healthy} | {sign.look} |" for sign in SIGNS]
    return "\n".join(["| metric | healthy | look into it when |", "|---|---|---|", *rows])


def page() -> str:
    return f"# The first 50 steps\n\n{SOURCES}\n\n{table()}"
