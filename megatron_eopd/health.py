"""Signs that a run goes wrong although nothing fails. In: an iteration's scalars. Out: warnings.

Each is told once, with what it means and what helps. Nothing here changes the run.
"""

from collections.abc import Mapping
from math import isfinite, nan

from megatron_eopd.config import Config
from megatron_eopd.objectives import GATES
from megatron_eopd.rollout.engine import SyncReport
from megatron_eopd.run_log import RunLog

EXPECTED_MISMATCH = {"float32": 1e-3, "bfloat16": 0.1}
"""mean exp|Δ| − 1 over sampled tokens between two sound implementations; a flat student in bfloat16
was seen at 0.15 to 0.35, which its own first iteration then says."""

OPEN_GATE, TRUNCATED, REPETITION = 0.9, 0.9, 0.5
MOSTLY_REFERENCES = 0.5
COLLAPSED = 0.1
"""Of the student's entropy in the first iteration, and of the teacher's at the same tokens."""


class HealthCheck:
    """Remembers what the first iteration of this start was like, and what was told already."""

    def __init__(self, config: Config, log: RunLog) -> None:
        self._config = config
        self._log = log
        self._told: set[str] = set()
        self._expected_mismatch = EXPECTED_MISMATCH[config.coarsest_dtype]
        self._mismatch: float | None = None
        self._first: Mapping[str, float] | None = None

    def look(self, scalars: Mapping[str, float], sync: SyncReport) -> None:
        """At one iteration. What it has nothing of, such as the mismatch of a batch of references
        alone, is not among the scalars; a NaN is a sign like a value that is too large."""
        has_entropy = "entropy/student_mean" in scalars  # not where every step was skipped
        if self._first is None and has_entropy and "rollout/length_mean" in scalars:
            self._first = scalars
        mismatch = scalars.get("mismatch/mult_prob_error", nan) - 1
        if self._mismatch is None and isfinite(mismatch):
            # What is far from rounding in the first iteration is no baseline.
            first = min(mismatch, 5 * self._expected_mismatch)
            self._mismatch = max(self._expected_mismatch, first)
        for name, message in self._signs(scalars, sync).items():
            if name not in self._told:
                self._told.add(name)
                self._log.line(f"WARNING (told once): {message}")

    def _signs(self, values: Mapping[str, float], sync: SyncReport) -> dict[str, str]:
        """Of this iteration, by kind."""
        rollout, objective = self._config.rollout, self._config.objective
        signs = {}
        if sync.probe is not None and sync.probe.verdict == "warn":
            signs["probe"] = sync.probe.message
        rounding = self._mismatch or self._expected_mismatch
        bound = 1 + rollout.mismatch_warn_factor * rounding
        # Replayed samples come from other weights, as they should.
        if rollout.replay is None and _exceeds(values, "mismatch/mult_prob_error", bound):
            signs["mismatch"] = (
                f"engine and trainer disagree on the sampled tokens: mean exp|Δ| − 1 is "
                f"{values['mismatch/mult_prob_error'] - 1:.3g}, more than "
                f"rollout.mismatch_warn_factor={rollout.mismatch_warn_factor:g} times the "
                f"{rounding:.3g} that rounding makes. The samples may come from other weights, or "
                f"from a cache that was filled under other weights; the loss still scores them "
                f"exactly."
            )
        is_gated = GATES[objective.formula.gate].reads_entropy
        if is_gated and _exceeds(values, "gate/fraction", OPEN_GATE):
            signs["gate"] = (
                f"the gate is open for {values['gate/fraction']:.0%} of the tokens, so forward KL "
                f"joins nearly everywhere: the teacher is unsure of what it reads (mean entropy "
                f"{values['entropy/teacher_mean']:.2f} nats, objective.entropy_threshold="
                f"{objective.entropy_threshold:g}). A student that writes garbage does that: warm "
                f"it up with rollout.reference_fraction=1 and final_reference_fraction=0."
            )
        if values.get("rollout/reference_fraction", 0.0) > MOSTLY_REFERENCES:
            return signs  # few samples, which say little
        if _exceeds(values, "rollout/truncated_fraction", TRUNCATED):
            signs["truncated"] = (
                f"{values['rollout/truncated_fraction']:.0%} of the responses were cut at "
                f"rollout.max_response_length={rollout.max_response_length}: the student does not "
                f"end its answers, or needs more room. Raise the option, or check the stop ids "
                f"that were told at start."
            )
        if _exceeds(values, "rollout/repetition", REPETITION):
            signs["repetition"] = (
                f"{values['rollout/repetition']:.0%} of the 4-grams of a response occurred in it "
                f"before: the student repeats itself. Lower training.lr, or warm it up on "
                f"reference answers."
            )
        if self._has_collapsed(values):
            signs["entropy"] = (
                f"the student's entropy fell to {values['entropy/student_mean']:.3f} nats, from "
                f"{self._first['entropy/student_mean']:.3f} at the start, and the teacher's is "
                f"{values['entropy/teacher_mean']:.3f}: its answers lose their diversity. Lower "
                f"training.lr or objective.entropy_threshold, or raise "
                f"objective.forward_kl_weight."
            )
        return signs

    def _has_collapsed(self, values: Mapping[str, float]) -> bool:
        if self._first is None or "entropy/student_mean" not in values:
            return False
        bound = min(self._first["entropy/student_mean"], values["entropy/teacher_mean"])
        return not values["entropy/student_mean"] >= COLLAPSED * bound


def _exceeds(values: Mapping[str, float], name: str, bound: float) -> bool:
    """Whether there is such a value, and it is not within the bound; NaN is not."""
    return name in values and not values[name] <= bound
