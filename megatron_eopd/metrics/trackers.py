"""Where a run is watched. In: scalars, histograms and text. Out: what people look at.

metrics.jsonl is always written (writer.py); a tracker shows the same beside it, on rank 0. To add
one, write a class with these methods here, and give it a row in TRACKERS.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch.utils.tensorboard import SummaryWriter


class Tracker(Protocol):
    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Finite values, by the names of docs/metrics.md."""
        ...

    def histograms(self, iteration: int, values: Mapping[str, Sequence[float]]) -> None: ...

    def text(self, iteration: int, name: str, markdown: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """RUN_DIR/tensorboard."""

    def __init__(self, run_dir: Path, first: int | None) -> None:
        """`first`: the iteration from which on everything is forgotten; None: nothing is."""
        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=first)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def histograms(self, iteration: int, values: Mapping[str, Sequence[float]]) -> None:
        for name, each in values.items():
            if each:
                self._writer.add_histogram(name, torch.tensor(each), iteration)

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._writer.add_text(name, markdown, iteration)

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, Callable[[Path, int | None], Tracker]] = {"tensorboard": TensorBoard}
"""By the words of logging.trackers: (run directory, iteration to forget from) → tracker."""
