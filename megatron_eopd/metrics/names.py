"""Every name that a run writes to metrics.jsonl, with its unit and what it means.

The one source: TensorBoard shows these texts, and the tables of docs/metrics.md are made of them.
In a name `<task>` stands for the name of an evaluation task, `<teacher>` for that of a teacher, `N`
for the number of an engine or of a part of all tokens, and `k` behind `@` or `^` for a number of
samples.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

NUM_QUARTERS = 4
"""Equal parts of a response, for by_position/*."""
ENTROPY_EDGES = (0.1, 0.4, 0.8, 1.6)
"""Of the teacher, in nats: where the parts of by_entropy/* meet. An entropy on an edge is in the
upper one."""


class Metric(NamedTuple):
    name: str
    unit: str
    """Empty of a number without one. `share`: of 1."""
    text: str
    """In Markdown, one line."""


_LOSS = (
    Metric("loss/total", "nats", "what is minimised"),
    Metric(
        "loss/reverse_kl",
        "nats",
        "KL(student ‖ teacher), exact over the full vocabulary whatever the objective's estimator; "
        "with `teacher.payload=topk` of k + 1 parts, the k tokens and the rest, which is never "
        "larger",
    ),
    Metric("loss/reverse_kl_gated", "nats", "KL(student ‖ teacher) over tokens with an open gate"),
    Metric(
        "loss/reverse_kl_ungated", "nats", "KL(student ‖ teacher) over tokens with a closed gate"
    ),
    Metric(
        "loss/forward_kl",
        "nats",
        "KL(teacher ‖ student), as exact, also where the gate keeps it out of the loss",
    ),
    Metric("loss/forward_kl_gated", "nats", "KL(teacher ‖ student) over tokens with an open gate"),
    Metric(
        "loss/forward_kl_ungated", "nats", "KL(teacher ‖ student) over tokens with a closed gate"
    ),
    *(
        Metric(
            f"loss/{term}_clipped",
            "share",
            f"tokens whose {text} term was above `objective.{term}_clip`, also where the gate "
            f"keeps it out of the loss; where that is set",
        )
        for term, text in (("reverse_kl", "reverse KL"), ("forward_kl", "forward KL"))
    ),
)

_ENTROPY = (
    Metric(
        "entropy/teacher_mean",
        "nats",
        "entropy of the teacher's full distribution, mean over tokens",
    ),
    Metric("entropy/teacher_p50", "nats", "entropy of the teacher, median over tokens"),
    Metric("entropy/teacher_p90", "nats", "entropy of the teacher, 90th percentile over tokens"),
    Metric("entropy/teacher", "nats", "entropy of the teacher at every token: a histogram"),
    Metric(
        "entropy/student_mean",
        "nats",
        "entropy of the student's full distribution, mean over tokens",
    ),
    Metric("entropy/student_p50", "nats", "entropy of the student, median over tokens"),
    Metric("entropy/student_p90", "nats", "entropy of the student, 90th percentile over tokens"),
    Metric("entropy/student_gated", "nats", "entropy of the student over tokens with an open gate"),
    Metric("entropy/student", "nats", "entropy of the student at every token: a histogram"),
    Metric(
        "gate/fraction",
        "share",
        "mean of the gate; with a gate of 0 or 1 the share of tokens for which it is open",
    ),
    Metric(
        "gate/threshold",
        "nats",
        "τ as it was used: scheduled, or the quantile of the step; for objectives whose gate has "
        "one",
    ),
)

_END = (
    Metric(
        "end/teacher_logprob",
        "nats",
        "log-probability that the teacher gives to the end token of a response, mean; far below "
        "the student's where the teacher ends its answers with another token",
    ),
    Metric(
        "end/student_logprob",
        "nats",
        "log-probability that the student gives to the end token of a response, mean",
    ),
)

_TOP_K = (
    Metric(
        "topk/teacher_mass",
        "share",
        "teacher probability on the support: its `objective.top_k` most probable tokens, unless "
        "`objective.top_k_support` says otherwise",
    ),
    Metric("topk/sampled_outside", "share", "sampled tokens outside the support"),
)

_OF_A_PART = (
    ("overlap", "share", "`overlap/top_k`"),
    ("teacher_mass", "share", "`overlap/teacher_mass`"),
    ("student_mass", "share", "`overlap/student_mass`"),
    ("entropy_gap", "nats", "`entropy/gap`"),
    ("reverse_kl", "nats", "`loss/reverse_kl`"),
    ("forward_kl", "nats", "`loss/forward_kl`"),
)

_DIAGNOSTICS = (
    Metric(
        "overlap/top_k",
        "share",
        "of the teacher's `objective.top_k` most probable tokens those that are among the "
        "student's, too",
    ),
    Metric("overlap/teacher_mass", "share", "teacher probability on the tokens that are in both"),
    Metric("overlap/student_mass", "share", "student probability on the tokens that are in both"),
    Metric(
        "entropy/gap",
        "nats",
        "entropy of the teacher less that of the student, mean over tokens; negative of a student "
        "that is less sure",
    ),
    *(
        Metric(f"by_position/N/{name}", unit, f"{text} over quarter N of the responses")
        for name, unit, text in _OF_A_PART
    ),
    Metric(
        "by_entropy/N/tokens",
        "share",
        f"tokens in bucket N of the teacher's entropy: 1 is below {ENTROPY_EDGES[0]} nats, "
        + ", ".join(f"{n} from {edge}" for n, edge in enumerate(ENTROPY_EDGES, start=2))
        + " on",
    ),
    *(
        Metric(f"by_entropy/N/{name}", unit, f"{text} over bucket N of the teacher's entropy")
        for name, unit, text in _OF_A_PART
    ),
)

_TEACHERS = (
    Metric("teacher/<teacher>/token_share", "share", "tokens that this teacher scores"),
    Metric(
        "teacher/<teacher>/loss",
        "nats",
        "what is minimised, at this teacher's tokens, its weight included",
    ),
    Metric("teacher/<teacher>/reverse_kl", "nats", "KL(student ‖ teacher) at its tokens"),
    Metric("teacher/<teacher>/forward_kl", "nats", "KL(teacher ‖ student) at its tokens"),
    Metric("teacher/<teacher>/entropy", "nats", "its entropy, mean over its tokens"),
    Metric("teacher/<teacher>/gate_fraction", "share", "mean of the gate at its tokens"),
    Metric(
        "time/score_<teacher>",
        "s",
        "rank 0's time for this teacher's pass, or for waiting for it; part of `time/score`",
    ),
)
"""Of runs with several; where their distributions are mixed, share and time alone."""

_ROLLOUT = (
    Metric(
        "rollout/length_mean",
        "tokens",
        "mean length of a response, the end-of-sequence token included",
    ),
    Metric("rollout/truncated_fraction", "share", "responses cut at `rollout.max_response_length`"),
    Metric("rollout/repetition", "share", "4-grams that occurred earlier in the same response"),
    Metric(
        "mismatch/logprob_abs_mean",
        "nats",
        "absolute difference between the engine's and the trainer's log-probability of a sampled "
        "token, in the first optimizer step of an iteration, mean",
    ),
    Metric("mismatch/logprob_abs_p99", "nats", "99th percentile of that absolute difference"),
    Metric(
        "mismatch/mult_prob_error",
        "",
        "mean of exp of the absolute difference between the engine's and the trainer's log-"
        "probability of a sampled token; 1 is perfect",
    ),
)

_SYNC = (
    Metric(
        "weight_sync/seconds",
        "s",
        "the sync at the end of the iteration: until every engine that takes part has committed "
        "the version. A wait for an engine that starts is in it",
    ),
    Metric("weight_sync/bytes", "bytes", "size of the weights that the sync sent"),
    Metric(
        "weight_sync/version", "", "version of the weights that the engines hold after the sync"
    ),
    Metric(
        "weight_sync/gather_s",
        "s",
        "part of the sync, of the student's rank that took longest: gathering tensors over the "
        "ranks that have parts of them",
    ),
    Metric(
        "weight_sync/hop_s",
        "s",
        "part of the sync, of the student's rank that took longest: sending tensors to other hosts",
    ),
    Metric(
        "weight_sync/hand_over_s",
        "s",
        "part of the sync, of the student's rank that took longest: copying tensors to the memory "
        "that engines read, with checksums",
    ),
    Metric(
        "weight_sync/wait_s",
        "s",
        "part of the sync, of the student's rank that took longest: waiting for engines that load "
        "what they have read",
    ),
    Metric(
        "weight_sync/load_s",
        "s",
        "beside the parts of the sync, of the engine that took longest: from when it begins to "
        "read until all is in its model",
    ),
    Metric("weight_sync/probe_s", "s", "behind the sync: engines and trainer score likely tokens"),
    Metric(
        "weight_sync/probe_difference",
        "nats",
        "mean difference between the engine's and the trainer's log-probabilities of likely "
        "tokens after the sync; the worst of the engines that serve",
    ),
)

_ENGINES = (
    Metric(
        "engine/alive", "engines", "engines that hold the weights of this iteration's end and serve"
    ),
    Metric("engine/queue_wait_s", "s", "how long a request waited for an engine, on average"),
    Metric(
        "engine/N/tokens_per_s",
        "tokens/s",
        "response tokens that engine N wrote, by the seconds of the calls",
    ),
    Metric(
        "engine/N/requests_in_flight",
        "requests",
        "requests that engine N had, on average over the calls",
    ),
    Metric(
        "engine/N/idle_share", "share", "share of the calls' time in which engine N had no request"
    ),
    Metric(
        "engine/N/restarts",
        "restarts",
        "how often engine N has been started again, since the command was",
    ),
    Metric(
        "engine/N/failed_requests",
        "deaths",
        "deaths of engine N, since the command was started, that left requests behind, which "
        "others or the next start of it answered",
    ),
    Metric(
        "engine/N/failed_probes",
        "syncs",
        "syncs, since the command was started, after which engine N alone did not hold the "
        "trainer's weights",
    ),
)

_REFERENCES = (
    Metric(
        "rollout/reference_fraction",
        "share",
        "of the iteration's responses that are reference answers",
    ),
    Metric("reference/length_mean", "tokens", "mean length of a reference answer"),
    *(
        Metric(f"{source}/{name}", unit, f"`{whole}` over the tokens of {whose}")
        for name, unit, whole in (
            ("loss", "nats", "loss/total"),
            ("reverse_kl", "nats", "loss/reverse_kl"),
            ("forward_kl", "nats", "loss/forward_kl"),
            ("gate_fraction", "share", "gate/fraction"),
            ("teacher_entropy", "nats", "entropy/teacher_mean"),
            ("student_entropy", "nats", "entropy/student_mean"),
        )
        for source, whose in (
            ("sampled", "the student's own samples"),
            ("reference", "reference answers"),
        )
    ),
)

_OPTIMIZER = (
    Metric(
        "optim/grad_norm",
        "",
        "before clipping, mean over the iteration's optimizer steps whose gradient is finite",
    ),
    Metric("optim/skipped_steps", "steps", "optimizer steps of the iteration that were left out"),
    Metric("optim/lr", "", "learning rate at the iteration's last optimizer step"),
    Metric(
        "packing/padding_fraction",
        "share",
        "padding among the tokens that the ranks work on, mean over the optimizer steps",
    ),
    Metric(
        "packing/load_imbalance",
        "",
        "tokens of the fullest data-parallel rank over the mean; 1 is perfect",
    ),
    Metric(
        "packing/microbatches",
        "microbatches",
        "microbatches of each data-parallel rank and optimizer step",
    ),
)

_TIME = (
    Metric("time/rollout", "s", "rank 0's time for drawing responses"),
    Metric("time/score", "s", "rank 0's time for the teachers' pass over the responses"),
    Metric("time/train", "s", "rank 0's time for the student's passes and the optimizer steps"),
    Metric(
        "time/sync", "s", "rank 0's time for giving the engines the new weights and checking it"
    ),
    Metric("time/record", "s", "rank 0's time for writing a recording of tokens, where one is due"),
    Metric("time/total", "s", "rank 0's time for the whole iteration, between its stages, too"),
    Metric("throughput/tokens_per_s", "tokens/s", "response tokens by `time/total`"),
    Metric("throughput/tokens_total", "tokens", "response tokens trained on so far, over resumes"),
    Metric(
        "memory/host_peak_gib",
        "GiB",
        "the most memory that a process of the student has had since its start, of the rank that "
        "has most",
    ),
    Metric(
        "memory/cuda_peak_gib",
        "GiB",
        "on a GPU: the most that PyTorch had allocated at once in the iteration, of the rank that "
        "has most. Not in it: what the allocator keeps in reserve, NCCL and CUDA themselves, and "
        "processes beside it, such as vLLM",
    ),
    *(
        Metric(
            f"memory/cuda_peak_gib/{stage}",
            "GiB",
            f"`memory/cuda_peak_gib` of the stage `time/{stage}`",
        )
        for stage in ("rollout", "score", "train", "sync", "record", "score_<teacher>")
    ),
)

_EVALUATION = (
    Metric(
        "eval/<task>/pass@k",
        "share",
        "some of k samples are right: unbiased, for k in 1, 4, 8, 16, 32, 64 up to "
        "`evaluation.samples_per_problem`",
    ),
    Metric("eval/<task>/pass^k", "share", "all of k samples are right"),
    Metric("eval/<task>/avg@k", "share", "mean accuracy, k = `evaluation.samples_per_problem`"),
    Metric(
        "eval/<task>/accuracy_low",
        "share",
        "lower end of the 95 % interval of the mean accuracy, by bootstrap over problems",
    ),
    Metric(
        "eval/<task>/accuracy_high", "share", "upper end of the 95 % interval of the mean accuracy"
    ),
    Metric("eval/<task>/maj@k", "share", "the commonest of k answers is right"),
    Metric("eval/<task>/distinct@k", "answers", "different answers among k samples"),
    Metric("eval/<task>/distinct_correct@k", "answers", "different right answers among k samples"),
    Metric(
        "eval/<task>/coverage",
        "share",
        "different right answers ÷ all there are, where their number is known",
    ),
    Metric("eval/<task>/length_mean", "tokens", "mean length of a response"),
    Metric(
        "eval/<task>/truncated_fraction", "share", "responses that were cut; they are never right"
    ),
    *(
        Metric(f"eval/<task>/verdict/{verdict}", "share", text)
        for verdict, text in (
            ("right", "samples whose answer is right"),
            ("wrong", "samples whose answer is wrong"),
            ("no_answer", "samples without an answer"),
            ("unparsable", "samples whose answer no grader can read"),
            ("timed_out", "samples whose grading took too long"),
        )
    ),
    Metric(
        "eval/<task>/grader_disagreement",
        "share",
        "samples that the two graders judge differently, of those that both judge",
    ),
    Metric(
        "eval/<task>/reverse_kl",
        "nats",
        "`loss/reverse_kl` on the student's own answers to held-out prompts",
    ),
    Metric(
        "eval/<task>/forward_kl",
        "nats",
        "`loss/forward_kl` on the student's own answers to held-out prompts",
    ),
    Metric(
        "eval/<task>/teacher_entropy",
        "nats",
        "mean entropy of the teacher on the student's own answers",
    ),
    Metric("eval/<task>/student_entropy", "nats", "mean entropy of the student on its own answers"),
    *(
        Metric(
            f"eval/<task>/{figure}",
            unit,
            f"`{whole}` on the student's own answers to held-out prompts",
        )
        for figure, unit, whole in (
            ("top_k_overlap", "share", "overlap/top_k"),
            ("overlap_teacher_mass", "share", "overlap/teacher_mass"),
            ("overlap_student_mass", "share", "overlap/student_mass"),
            ("entropy_gap", "nats", "entropy/gap"),
        )
    ),
    Metric(
        "eval/<task>/teacher_above_threshold",
        "share",
        "tokens of the student's own answers where the teacher's entropy reaches "
        "`objective.entropy_threshold`",
    ),
    Metric(
        "eval/<task>/student_above_threshold",
        "share",
        "tokens of the student's own answers where its own entropy reaches "
        "`objective.entropy_threshold`",
    ),
)

GROUPS: dict[str, tuple[Metric, ...]] = {
    "Loss": _LOSS,
    "Entropy and gate": _ENTROPY,
    "End of a response": _END,
    "Top k": _TOP_K,
    "Student against teacher": _DIAGNOSTICS,
    "Several teachers": _TEACHERS,
    "Rollouts, engine, weight sync": _ROLLOUT + _SYNC + _ENGINES,
    "Reference answers": _REFERENCES,
    "Optimizer and packing": _OPTIMIZER,
    "Time, throughput, memory": _TIME,
    "Evaluation": _EVALUATION,
}
"""Title → its metrics, as docs/metrics.md has them."""


def all_metrics() -> Iterator[Metric]:
    for metrics in GROUPS.values():
        yield from metrics


def find(name: str) -> Metric | None:
    """What a written name means; None of one that is not registered."""
    exact, patterns = _lookup()
    return exact.get(name) or next((m for p, m in patterns if p.fullmatch(name)), None)


@cache
def _lookup() -> tuple[dict[str, Metric], list[tuple[re.Pattern[str], Metric]]]:
    exact, patterns = {}, []
    for metric in all_metrics():
        pattern = re.sub("<task>|<teacher>", "[^/]+", re.escape(metric.name))
        pattern = pattern.replace("/N/", r"/\d+/")
        pattern = re.sub(r"(@|\\\^)k$", r"\1\\d+", pattern)
        if pattern == re.escape(metric.name):
            exact[metric.name] = metric
        else:
            patterns.append((re.compile(pattern), metric))
    return exact, patterns


def table(group: str) -> str:
    """A group's metrics in Markdown."""
    rows = [f"| `{m.name}` | {m.unit or '–'} | {m.text} |" for m in GROUPS[group]]
    return "\n".join(["| name | unit | meaning |", "|---|---|---|", *rows])


def page() -> str:
    """All of them in Markdown."""
    return "\n\n".join(f"**{group}**\n\n{table(group)}" for group in GROUPS)
