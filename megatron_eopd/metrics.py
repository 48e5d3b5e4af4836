"""Means as sums and counts until the last moment, and the files that show them.

Names are the project's stable ones: `loss/reverse_kl`, `gate/fraction`, `rollout/length_mean`, …
"""
# Shapes: N valid response tokens of a microbatch.

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

Sums = dict[str, tuple[float, float]]
"""Metric name → (sum, count) over tokens."""


class Reduced(NamedTuple):
    """Means of all ranks of a group, before the last division."""

    sums: Sums
    values: dict[str, list[float]]
    """Name → every single value."""
    tallies: dict[str, list]
    """Name → counts, as nested lists."""


class Means:
    """Named means, kept as (sum, count) on the device; per-token values kept for histograms."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._tallies: dict[str, torch.Tensor] = {}
        self._values: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, values_N: torch.Tensor, mask_N: torch.Tensor | None = None) -> None:
        """Mean over the tokens where the mask is set; over all of them without a mask."""
        values_N = values_N.double()  # a float32 sum of 300 tokens is off by 1e-7
        weights = torch.ones_like(values_N) if mask_N is None else mask_N.double()
        entry = torch.stack([(values_N * weights).sum(), weights.sum()])
        self._sums[name] = self._sums.get(name, 0) + entry

    def keep(self, name: str, values_N: torch.Tensor) -> None:
        """Every single value that is not nan, for percentiles and a histogram."""
        self._values.setdefault(name, []).append(values_N)

    def tally(self, name: str, counts: torch.Tensor) -> None:
        """Counts of any shape, added up as they are."""
        self._tallies[name] = self._tallies.get(name, 0) + counts

    def reduce(self, group: dist.ProcessGroup) -> Reduced:
        """Over the group, every rank of which must have added the same names.

        One all-reduce of the sums and of each tally, one all-gather of the values.
        """
        names = sorted(self._sums)
        table = torch.stack([self._sums[name] for name in names])
        dist.all_reduce(table, group=group)
        sums = {n: (total, count) for n, (total, count) in zip(names, table.tolist(), strict=True)}
        for name in sorted(self._tallies):
            dist.all_reduce(self._tallies[name], group=group)
        own = {name: torch.cat(parts).tolist() for name, parts in self._values.items()}
        gathered: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, own, group=group)
        values = {n: [x for part in gathered for x in part[n] if x == x] for n in own}
        return Reduced(sums, values, {name: t.tolist() for name, t in self._tallies.items()})


def divide(sums: Iterable[Sums]) -> dict[str, float]:
    """Means from the sums of several batches. A mean over nothing is left out: NaN is a fault."""
    totals: Sums = {}
    for batch in sums:
        for name, (total, count) in batch.items():
            old_total, old_count = totals.get(name, (0.0, 0.0))
            totals[name] = (old_total + total, old_count + count)
    return {name: total / count for name, (total, count) in totals.items() if count}


def percentile(values: list[float], fraction: float) -> float:
    """By linear interpolation; NaN of nothing."""
    if not values:
        return math.nan
    return torch.quantile(torch.tensor(values, dtype=torch.float64), fraction).item()


class MetricsWriter:
    """metrics.jsonl and TensorBoard of a run, written on one rank.

    A run that resumes at iteration i forgets what a broken-off run wrote after i, so that the two
    files tell one story.
    """

    def __init__(self, run_dir: Path, resumed_at: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        self.tokens_total = self._truncate_after(resumed_at)
        """Response tokens that the run has trained on."""
        self._file = self._path.open("a")
        self._tensorboard = SummaryWriter(
            run_dir / "tensorboard", purge_step=resumed_at + 1 if resumed_at else 0
        )

    def _truncate_after(self, iteration: int) -> int:
        """Returns the tokens of the rows that are kept."""
        if not self._path.is_file():
            return 0
        # At 0 nothing counts: the evaluation before the first iteration is made again.
        rows = read_metrics(self._path) if iteration else []
        kept = [row for row in rows if row["iteration"] <= iteration]
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(unfinished, self._path)
        return max((int(row.get("throughput/tokens_total", 0)) for row in kept), default=0)

    def write(
        self,
        iteration: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, list[float]] | None = None,
    ) -> None:
        """Scalars that are not finite are left out: JSON has neither NaN nor infinity."""
        self.tokens_total = int(scalars.get("throughput/tokens_total", self.tokens_total))
        finite = {n: rounded(value) for n, value in scalars.items() if math.isfinite(value)}
        self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        self._file.flush()
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, iteration)
        for name, values in (histograms or {}).items():
            if values:
                self._tensorboard.add_histogram(name, torch.tensor(values), iteration)

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._tensorboard.add_text(name, markdown, iteration)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def rounded(value: float) -> float:
    """To 12 significant digits: the mean of a constant is then the constant."""
    return float(f"{value:.12g}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that a crash cut short is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
