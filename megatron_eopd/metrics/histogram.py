"""Values of many tokens as counts in fixed bins. In: tensors on the device. Out: Histogram, and
percentiles from it.

Counting never waits for the device, and counts of chunks, ranks and steps simply add up. What it
costs: a percentile is off by less than the width of the bin that holds it.
"""
# Shapes: N values, B bins.

import math
from collections.abc import Iterable

import torch

from megatron_eopd.records import Bins, Histogram

LOGPROB_DIFFERENCE = Bins("log", low=1e-8, high=100.0, count=4096)
"""Of absolute differences in nats: each bin is 0.56 % wide. Two float32 numbers of that size do not
differ by less than `low`."""


def entropy_bins(vocab_size: int) -> Bins:
    """Of entropies in nats: 0.0015 wide for 152k tokens."""
    return Bins("linear", low=0.0, high=math.log(max(vocab_size, 2)), count=8192)


def no_counts(bins: Bins, device: torch.device) -> torch.Tensor:
    """int64 [B]."""
    return torch.zeros(bins.count, dtype=torch.int64, device=device)


def add_counts(counts_B: torch.Tensor, values_N: torch.Tensor, bins: Bins) -> None:
    """Count the values that are not NaN, in place."""
    values_N = values_N.double()
    if bins.scale == "linear":
        place_N = (values_N - bins.low) * (bins.count / (bins.high - bins.low))
    else:
        ratio = (bins.count - 1) / math.log(bins.high / bins.low)
        place_N = 1 + (values_N.clamp(min=0) / bins.low).log() * ratio
    place_N = place_N.nan_to_num(nan=0.0).clamp(0, bins.count - 1).long()
    # bincount and histc would ask the device for a size, or be refused as not deterministic.
    counts_B.scatter_add_(0, place_N, (~values_N.isnan()).long())


def edges(bins: Bins) -> list[float]:
    """The borders of the bins, one more than there are bins."""
    if bins.scale == "linear":
        width = (bins.high - bins.low) / bins.count
        return [bins.low + width * n for n in range(bins.count + 1)]
    ratio = math.log(bins.high / bins.low) / (bins.count - 1)
    return [0.0, *(bins.low * math.exp(ratio * n) for n in range(bins.count))]


def merge(histograms: Iterable[Histogram]) -> Histogram:
    """Of at least one, over the same bins."""
    first, *others = histograms
    assert all(other.bins == first.bins for other in others), [first.bins, *others]
    columns = zip(first.counts, *(other.counts for other in others), strict=True)
    return Histogram(first.bins, tuple(map(sum, columns)))


def percentile(histogram: Histogram, fraction: float) -> float:
    """As torch.quantile finds it, to within the width of its bin; NaN of nothing.

    Interpolated between the two values next to the rank, as there; and each of those by its rank
    within its bin, as if the bin's values lay evenly in it.
    """
    total = sum(histogram.counts)
    if not total:
        return math.nan
    rank = fraction * (total - 1)
    below, above = (_order_statistic(histogram, n) for n in (math.floor(rank), math.ceil(rank)))
    return below + (above - below) * (rank - math.floor(rank))


def _order_statistic(histogram: Histogram, rank: int) -> float:
    borders, before = edges(histogram.bins), 0
    for n, count in enumerate(histogram.counts):
        if before + count > rank:
            low, high = borders[n], borders[n + 1]
            return low + (high - low) * (rank - before + 0.5) / count
        before += count
    raise AssertionError(f"rank {rank} of {before} values")


def coarse(histogram: Histogram, most: int) -> tuple[list[float], list[int]]:
    """(borders, counts): neighbouring bins put together into at most so many, without the empty
    ones at both ends; no bin of no values."""
    step = -(-histogram.bins.count // most)
    counts = [sum(histogram.counts[n : n + step]) for n in range(0, histogram.bins.count, step)]
    fine = edges(histogram.bins)
    borders = [*fine[:-1:step], fine[-1]]
    filled = [n for n, count in enumerate(counts) if count]
    if not filled:
        return [], []
    first, end = filled[0], filled[-1] + 1
    return borders[first : end + 1], counts[first:end]
