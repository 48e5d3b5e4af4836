"""Where a run is watched. In: scalars, histograms and text. Out: what people look at.

metrics.jsonl is always written (writer.py); a tracker shows the same beside it, on rank 0. To add
one, write a class with these methods here, and give it a row in TRACKERS.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from megatron_eopd.metrics.histogram import coarse
from megatron_eopd.records import Histogram

MOST_BUCKETS = 512
"""Of a histogram in TensorBoard's file."""


class Tracker(Protocol):
    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Finite values, by the names of docs/metrics.md."""
        ...

    def histograms(self, iteration: int, values: Mapping[str, Histogram]) -> None: ...

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

    def histograms(self, iteration: int, values: Mapping[str, Histogram]) -> None:
        for name, each in values.items():
            borders, counts = coarse(each, MOST_BUCKETS)
            if not counts:
                continue
            middles = [(low + high) / 2 for low, high in pairwise(borders)]
            moments = [
                sum(count * middle**power for count, middle in zip(counts, middles, strict=True))
                for power in (1, 2)
            ]
            # TensorBoard knows upper borders only: an empty bucket in front says where the first
            # one begins.
            self._writer.add_histogram_raw(
                name,
                borders[0],
                borders[-1],
                sum(counts),
                *moments,
                borders,
                [0, *counts],
                global_step=iteration,
            )

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._writer.add_text(name, markdown, iteration)

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, Callable[[Path, int | None], Tracker]] = {"tensorboard": TensorBoard}
"""By the words of logging.trackers: (run directory, iteration to forget from) → tracker."""
