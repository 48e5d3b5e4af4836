"""Means as sums and counts, and histograms, until the last moment.

Names are the project's stable ones: `loss/reverse_kl`, `gate/fraction`, `rollout/length_mean`, …
Everything stays on the device until `reduce`, which asks it once.
"""
# Shapes: N valid response tokens of a microbatch, B bins.

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_eopd.metrics.histogram import add_counts, no_counts
from megatron_eopd.records import Bins, Histogram

Sums = dict[str, tuple[float, float]]
"""Metric name → (sum, count) over tokens."""


class Reduced(NamedTuple):
    """Means of all ranks of a group, before the last division."""

    sums: Sums
    histograms: dict[str, Histogram]
    tallies: dict[str, list]
    """Name → counts, as nested lists."""


class Means:
    """Named means, kept as (sum, count) on the device, and counts."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._tallies: dict[str, torch.Tensor] = {}
        self._histograms: dict[str, tuple[Bins, torch.Tensor]] = {}

    def add(self, name: str, values_N: torch.Tensor, mask_N: torch.Tensor | None = None) -> None:
        """Mean over the tokens where the mask is set; over all of them without a mask."""
        values_N = values_N.double()  # a float32 sum of 300 tokens is off by 1e-7
        counts_N = torch.ones_like(values_N)
        if mask_N is not None:  # a product with 0 would make NaN of an infinite divergence
            values_N, counts_N = values_N.where(mask_N, 0.0), mask_N.double()
        entry = torch.stack([values_N.sum(), counts_N.sum()])
        self._sums[name] = self._sums.get(name, 0) + entry

    def keep(self, name: str, values_N: torch.Tensor, bins: Bins) -> None:
        """Every single value that is not nan, for percentiles and a histogram."""
        if name not in self._histograms:
            self._histograms[name] = (bins, no_counts(bins, values_N.device))
        add_counts(self._histograms[name][1], values_N, bins)

    def tally(self, name: str, counts: torch.Tensor) -> None:
        """Counts of any shape, added up as they are."""
        self._tallies[name] = self._tallies.get(name, 0) + counts

    def reduce(self, group: dist.ProcessGroup) -> Reduced:
        """Over the group, every rank of which must have added the same names.

        One all-reduce and one copy to the host, of everything in one row of float64, in which
        counts are exact up to 2^53.
        """
        tables = [
            {name: table[name] for name in sorted(table)}
            for table in (self._sums, self._tallies, self._bin_counts())
        ]
        own = [each for table in tables for each in table.values()]
        row = torch.cat([each.double().flatten() for each in own])
        dist.all_reduce(row, group=group)
        parts = iter(row.cpu().split([each.numel() for each in own]))
        sums, tallies, counts = ({name: next(parts) for name in table} for table in tables)
        return Reduced(
            {name: tuple(pair.tolist()) for name, pair in sums.items()},
            {
                name: Histogram(self._histograms[name][0], tuple(counts_B.long().tolist()))
                for name, counts_B in counts.items()
            },
            {
                name: flat.long().view(self._tallies[name].shape).tolist()
                for name, flat in tallies.items()
            },
        )

    def _bin_counts(self) -> dict[str, torch.Tensor]:
        return {name: counts_B for name, (_, counts_B) in self._histograms.items()}


def divide(sums: Iterable[Sums]) -> dict[str, float]:
    """Means from the sums of several batches. A mean over nothing is left out: NaN is a fault."""
    totals: Sums = {}
    for batch in sums:
        for name, (total, count) in batch.items():
            old_total, old_count = totals.get(name, (0.0, 0.0))
            totals[name] = (old_total + total, old_count + count)
    return {name: total / count for name, (total, count) in totals.items() if count}
