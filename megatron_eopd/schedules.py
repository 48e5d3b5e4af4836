"""What moves while a run goes on. In: how far the run is. Out: a number.

Every schedule reads the same Progress, which counts iterations and the optimizer steps that were
really taken. So a run that is resumed with another batch size is at the same place of all of them.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_eopd.config import TrainingConfig


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    iterations: float
    """Finished ones, and the share of the current one that is."""
    steps: int
    """Optimizer steps taken, those before a resume too."""
    train_iters: int
    """Of the whole run."""

    @property
    def share(self) -> float:
        """Of the run that lies behind."""
        return self.iterations / max(self.train_iters, 1)


START = Progress(iterations=0, steps=0, train_iters=1)


def scheduled(
    start: float, end: float | None, style: Literal["linear", "cosine"], done: float
) -> float:
    """`start` before the schedule, `end` behind it (None: no schedule); `done` is the share of it
    that lies behind, and may pass 1."""
    if end is None:
        return start
    done = min(max(done, 0.0), 1.0)
    if style == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return start + done * (end - start)


def lr_at(training: TrainingConfig, progress: Progress) -> float:
    """The learning rate of the next optimizer step: the decay over iterations, times the warm-up
    over optimizer steps."""
    lr = training.lr
    if training.lr_decay_style != "constant":
        iters = training.lr_decay_iters or max(progress.train_iters, 1)
        done = progress.iterations / iters
        lr = scheduled(lr, training.min_lr, training.lr_decay_style, done)
    if progress.steps < training.lr_warmup_steps:
        lr *= progress.steps / training.lr_warmup_steps
    return lr
