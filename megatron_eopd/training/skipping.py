"""Which steps a run leaves out, and when that is enough. In: StepReports. Out: a bound, a reason.

Its two numbers of state go into checkpoints, so that a run that resumes skips what it would have
skipped without the stop.
"""

import math
from collections.abc import Sequence
from statistics import median

from megatron_eopd.config import TrainingConfig
from megatron_eopd.records import StepFault, StepReport


class StepGuard:
    """After OLMo-core's SkipStepOptimizer, which knows 128 steps, and skips none before it knows
    half of them. It skips what is 6 standard deviations from the mean; a multiple of the median is
    not moved by the spikes that are already in the window."""

    def __init__(
        self, training: TrainingConfig, grad_norms: Sequence[float] = (), skipped_in_a_row: int = 0
    ) -> None:
        """The last two: as the checkpoint has them."""
        self._training = training
        skips = training.skip_grad_norm_factor is not None
        self.grad_norms = tuple(grad_norms)[-training.skip_grad_norm_window :] if skips else ()
        """Of the last steps, the oldest first; empty unless spikes are skipped."""
        self.skipped_in_a_row = skipped_in_a_row

    def skip_above(self) -> float | None:
        """The largest gradient norm of a next step that is taken; None bounds nothing."""
        factor, window = (
            self._training.skip_grad_norm_factor,
            self._training.skip_grad_norm_window,
        )
        if factor is None or len(self.grad_norms) < window / 2:
            return None
        return factor * median(self.grad_norms)

    def note(self, report: StepReport) -> None:
        """After every step. A skipped norm counts too: one that stays high is no spike."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.fault else 0
        if self._training.skip_grad_norm_factor is not None and math.isfinite(report.grad_norm):
            window = self._training.skip_grad_norm_window
            self.grad_norms = (*self.grad_norms, report.grad_norm)[-window:]

    def reason_to_stop(self, fault: StepFault) -> str:
        """Why the step that was just noted ends the run; empty when it is skipped."""
        training = self._training
        if fault.kind == "weights":
            return (
                "Start again, which goes on from the newest checkpoint, with a lower training.lr "
                "or a larger training.adam_eps."
            )
        if fault.kind == "gradient" and training.on_nonfinite == "stop":
            return (
                "Lower training.lr or training.clip_grad, start again from an earlier checkpoint, "
                "or leave such steps out with training.on_nonfinite=skip."
            )
        if self.skipped_in_a_row > training.max_skipped_steps:
            return (
                f"It is number {self.skipped_in_a_row} in a row, and "
                f"training.max_skipped_steps={training.max_skipped_steps}. Lower training.lr, or "
                f"start again from an earlier checkpoint."
            )
        return ""
