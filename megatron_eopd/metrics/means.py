"""Means as sums and counts until the last moment.

Names are the project's stable ones: `loss/reverse_kl`, `gate/fraction`, `rollout/length_mean`, …
"""
# Shapes: N valid response tokens of a microbatch.

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist

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

    def __init__(self, *, keeps_values: bool = True) -> None:
        self._keeps_values = keeps_values
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
        if self._keeps_values:
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
