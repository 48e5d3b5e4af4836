"""metrics.jsonl: a line for each iteration and each evaluation, and the trackers beside it."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_eopd.metrics.rows import read_metrics
from megatron_eopd.metrics.trackers import TRACKERS
from megatron_eopd.records import Histogram


class MetricsWriter:
    """metrics.jsonl of a run and its trackers, written on one rank.

    A run that resumes at iteration i forgets what a broken-off run wrote after i, so that all of
    them tell one story.
    """

    def __init__(
        self,
        run_dir: Path,
        resumed_at: int | None,
        trackers: Sequence[str] = ("tensorboard",),
        *,
        is_evaluated: bool = True,
    ) -> None:
        """`resumed_at`: None of a run that begins. `is_evaluated`: whether the evaluation there was
        made before; otherwise a broken-off run may have made it after its checkpoint."""
        self._path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        self.tokens_total = self._truncate_after(resumed_at, is_evaluated)
        """Response tokens that the run has trained on."""
        self._file = self._path.open("a")
        first = 0 if resumed_at is None else resumed_at + 1
        self._trackers = [TRACKERS[name](run_dir, first) for name in trackers]

    def _truncate_after(self, iteration: int | None, is_evaluated: bool) -> int:
        """Returns the tokens of the rows that are kept."""
        if not self._path.is_file():
            return 0
        rows = read_metrics(self._path) if iteration is not None else []
        kept = [row for row in rows if row["iteration"] <= iteration]
        if not is_evaluated:
            kept = [row for row in kept if row["iteration"] < iteration or not _is_evaluation(row)]
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(unfinished, self._path)
        return max((int(row.get("throughput/tokens_total", 0)) for row in kept), default=0)

    def write(
        self,
        iteration: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Histogram] | None = None,
    ) -> None:
        """Scalars that are not finite are left out: JSON has neither NaN nor infinity."""
        self.tokens_total = int(scalars.get("throughput/tokens_total", self.tokens_total))
        finite = {n: rounded(value) for n, value in scalars.items() if math.isfinite(value)}
        self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.scalars(iteration, finite)
            tracker.histograms(iteration, histograms or {})

    def text(self, iteration: int, name: str, markdown: str) -> None:
        for tracker in self._trackers:
            tracker.text(iteration, name, markdown)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in row)


def rounded(value: float) -> float:
    """To 12 significant digits: the mean of a constant is then the constant."""
    return float(f"{value:.12g}")
