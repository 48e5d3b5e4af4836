"""Warnings while a run goes on, each told once. In: an iteration's scalars. Out: lines.

Nothing here changes the run. Which signs there are: warning_rules.py.
"""

from collections.abc import Mapping
from math import isfinite, nan

from megatron_eopd.config import Config
from megatron_eopd.rollout.engine import SyncReport
from megatron_eopd.run_log import RunLog
from megatron_eopd.warning_rules import RULES, Rule, Seen

EXPECTED_MISMATCH = {"float32": 1e-3, "bfloat16": 0.1}
"""mean exp|Δ| − 1 over sampled tokens between two sound implementations; a flat student in bfloat16
was seen at 0.15 to 0.35, which its own first iteration then says."""


class HealthCheck:
    """Remembers what the first iteration of this start was like, and what was told already."""

    def __init__(self, config: Config, log: RunLog) -> None:
        self._config = config
        self._log = log
        self._told: set[Rule] = set()
        self._expected_mismatch = EXPECTED_MISMATCH[config.coarsest_dtype]
        self._mismatch: float | None = None
        self._first: Mapping[str, float] | None = None

    def look(self, scalars: Mapping[str, float], sync: SyncReport) -> None:
        """At one iteration."""
        has_entropy = "entropy/student_mean" in scalars  # not where every step was skipped
        if self._first is None and has_entropy and "rollout/length_mean" in scalars:
            self._first = scalars
        mismatch = scalars.get("mismatch/mult_prob_error", nan) - 1
        if self._mismatch is None and isfinite(mismatch):
            # What is far from rounding in the first iteration is no baseline.
            first = min(mismatch, 5 * self._expected_mismatch)
            self._mismatch = max(self._expected_mismatch, first)
        rounding = self._mismatch or self._expected_mismatch
        seen = Seen(scalars, self._first, rounding, sync, self._config)
        for rule in RULES:
            message = None if rule in self._told else rule(seen)
            if message is not None:
                self._told.add(rule)
                self._log.line(f"WARNING (told once): {message}")
