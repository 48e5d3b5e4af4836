"""Signs that a run goes wrong although nothing fails. In: an iteration's scalars. Out: messages.

One function for each sign: None, or what it means and what helps. docs/monitoring.md has them in a
table; a NaN is a sign like a value that is too large.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_eopd.config import Config
from megatron_eopd.objectives import GATES
from megatron_eopd.rollout.engine import SyncReport

OPEN_GATE, CLOSED_GATE = 0.9, 0.002
TRUNCATED, REPETITION = 0.9, 0.5
RUNAWAY_LENGTH, RUNAWAY_TRUNCATED = 2.0, 0.2
"""Times the first iteration's mean length, and how many more responses are cut than there."""
COLLAPSED = 0.1
"""Of the student's entropy in the first iteration, and of the teacher's at the same tokens."""
END_LOGPROB = -12.0
"""Nats. A teacher that ends its own answers otherwise was seen at −21."""
MOSTLY_REFERENCES = 0.5
"""Then there are few samples, which say little."""


@dataclass(frozen=True)
class Seen:
    """What a rule may look at."""

    values: Mapping[str, float]
    """Of this iteration. What it has nothing of, such as the mismatch of a batch of references
    alone, is not among them."""
    first: Mapping[str, float] | None
    """Of the first iteration of this start that had samples and a sound step."""
    rounding: float
    """mean exp|Δ| − 1 that two sound implementations have here."""
    sync: SyncReport
    config: Config

    def exceeds(self, name: str, bound: float) -> bool:
        """Whether there is such a value, and it is not within the bound."""
        return name in self.values and not self.values[name] <= bound

    @property
    def has_samples(self) -> bool:
        return self.values.get("rollout/reference_fraction", 0.0) <= MOSTLY_REFERENCES

    @property
    def is_gated(self) -> bool:
        """By a threshold that somebody has set; a quantile is as open as it is asked to be."""
        gate = GATES[self.config.objective.formula.gate]
        return gate.reads_entropy and not gate.needs_whole_step


def probe(seen: Seen) -> str | None:
    told = seen.sync.probe is not None and seen.sync.probe.verdict == "warn"
    return seen.sync.probe.message if told else None


def mismatch(seen: Seen) -> str | None:
    # Replayed samples come from other weights, as they should.
    options = seen.config.rollout
    bound = 1 + options.mismatch_warn_factor * seen.rounding
    if options.replay is not None or not seen.exceeds("mismatch/mult_prob_error", bound):
        return None
    return (
        f"engine and trainer disagree on the sampled tokens: mean exp|Δ| − 1 is "
        f"{seen.values['mismatch/mult_prob_error'] - 1:.3g}, more than "
        f"rollout.mismatch_warn_factor={options.mismatch_warn_factor:g} times the "
        f"{seen.rounding:.3g} that rounding makes. The samples may come from other weights, or "
        f"from a cache that was filled under other weights; the loss still scores them exactly."
    )


def gate_open(seen: Seen) -> str | None:
    if not (seen.is_gated and seen.exceeds("gate/fraction", OPEN_GATE)):
        return None
    return (
        f"the gate is open for {seen.values['gate/fraction']:.0%} of the tokens, so forward KL "
        f"joins nearly everywhere: the teacher is unsure of what it reads (mean entropy "
        f"{seen.values['entropy/teacher_mean']:.2f} nats, objective.entropy_threshold="
        f"{seen.config.objective.entropy_threshold:g}). A student that writes garbage does that: "
        f"warm it up with rollout.reference_fraction=1 and final_reference_fraction=0."
    )


def gate_closed(seen: Seen) -> str | None:
    fraction = seen.values.get("gate/fraction", CLOSED_GATE)
    if not (seen.is_gated and fraction < CLOSED_GATE):
        return None
    p90 = seen.values.get("entropy/teacher_p90")
    return (
        f"the gate is open for {fraction:.2%} of the tokens, so forward KL hardly joins and this "
        f"run is one of reverse KL: the teacher is surer than objective.entropy_threshold="
        f"{seen.config.objective.entropy_threshold:g} nats nearly everywhere"
        + (f" (a tenth of its entropies are above {p90:.2g})" if p90 is not None else "")
        + ". Lower the threshold, or take objective.gate=quantile; objective.name=opd asks for "
        "reverse KL by name."
    )


def truncated(seen: Seen) -> str | None:
    if not (seen.has_samples and seen.exceeds("rollout/truncated_fraction", TRUNCATED)):
        return None
    return (
        f"{seen.values['rollout/truncated_fraction']:.0%} of the responses were cut at "
        f"rollout.max_response_length={seen.config.rollout.max_response_length}: the student does "
        f"not end its answers, or needs more room. Raise the option, or check the stop ids that "
        f"were told at start."
    )


def runaway_length(seen: Seen) -> str | None:
    if seen.first is None or not seen.has_samples:
        return None
    before = {name: seen.first.get(f"rollout/{name}", 0.0) for name in _LENGTHS}
    if not (
        seen.exceeds("rollout/length_mean", RUNAWAY_LENGTH * before["length_mean"])
        and seen.exceeds(
            "rollout/truncated_fraction", before["truncated_fraction"] + RUNAWAY_TRUNCATED
        )
    ):
        return None
    return (
        f"answers run away: their mean length went from {before['length_mean']:.0f} to "
        f"{seen.values['rollout/length_mean']:.0f} tokens, and "
        f"{seen.values['rollout/truncated_fraction']:.0%} are cut, from "
        f"{before['truncated_fraction']:.0%} at the start. Look at the ends of some with "
        f"`python -m megatron_eopd.view {seen.config.run_dir}`: where the teacher would end "
        f"otherwise, set teacher.eos_token_map; else lower training.lr."
    )


_LENGTHS = ("length_mean", "truncated_fraction")


def repetition(seen: Seen) -> str | None:
    if not (seen.has_samples and seen.exceeds("rollout/repetition", REPETITION)):
        return None
    return (
        f"{seen.values['rollout/repetition']:.0%} of the 4-grams of a response occurred in it "
        f"before: the student repeats itself. Lower training.lr, or warm it up on reference "
        f"answers."
    )


def entropy_collapse(seen: Seen) -> str | None:
    if seen.first is None or not seen.has_samples or "entropy/student_mean" not in seen.values:
        return None
    now, before = seen.values["entropy/student_mean"], seen.first["entropy/student_mean"]
    teachers = seen.values["entropy/teacher_mean"]
    if now >= COLLAPSED * min(before, teachers):
        return None
    return (
        f"the student's entropy fell to {now:.3f} nats, from {before:.3f} at the start, and the "
        f"teacher's is {teachers:.3f}: its answers lose their diversity. Lower training.lr or "
        f"objective.entropy_threshold, or raise objective.forward_kl_weight."
    )


def end_tokens(seen: Seen) -> str | None:
    teachers = seen.values.get("end/teacher_logprob", 0.0)
    if teachers >= END_LOGPROB:
        return None
    return (
        f"student and teacher disagree on how an answer ends: to the tokens that ended a response "
        f"the teacher gives a log-probability of {teachers:.3g} nats in the mean, the student "
        f"{seen.values['end/student_logprob']:.3g}. A base student with an instructed teacher does "
        f"that, and ends in answers that never end: set teacher.eos_token_map."
    )


Rule = Callable[[Seen], str | None]
RULES: tuple[Rule, ...] = (
    probe,
    mismatch,
    gate_open,
    gate_closed,
    truncated,
    runaway_length,
    repetition,
    entropy_collapse,
    end_tokens,
)
