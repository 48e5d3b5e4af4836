"""Histograms in fixed bins say what the values themselves would, to within a bin."""

import math
from itertools import pairwise

import pytest
import torch

from megatron_eopd.metrics.histogram import (
    LOGPROB_DIFFERENCE,
    add_counts,
    coarse,
    edges,
    entropy_bins,
    merge,
    no_counts,
    percentile,
)
from megatron_eopd.records import Bins, Histogram

FRACTIONS = (0.0, 0.01, 0.5, 0.9, 0.99, 1.0)
ENTROPY = entropy_bins(151_936)


def counted(values: torch.Tensor, bins: Bins) -> Histogram:
    counts = no_counts(bins, values.device)
    for chunk in values.split(1000):
        add_counts(counts, chunk, bins)
    return Histogram(bins, tuple(counts.tolist()))


@pytest.mark.parametrize("count", [1, 2, 17, 20_000])
@pytest.mark.parametrize(
    ("bins", "error"),
    [(ENTROPY, {"abs": 0.0015}), (LOGPROB_DIFFERENCE, {"rel": 0.0057, "abs": 1e-8})],
)
def test_a_percentile_is_that_of_the_values_to_within_a_bin(bins, error, count):
    """torch.quantile of the values themselves: entropies that are mostly near zero, and differences
    over seven decades, some of them zero."""
    generator = torch.Generator().manual_seed(count)
    values = torch.rand(count, generator=generator) ** 6
    values = values * 11.9 if bins is ENTROPY else values * (values > 0.001)
    found = counted(values, bins)
    for fraction in FRACTIONS:
        exact = torch.quantile(values.double(), fraction).item()
        assert percentile(found, fraction) == pytest.approx(exact, **error), fraction


def test_the_widest_bins_are_as_narrow_as_documented():
    borders = edges(ENTROPY)
    assert len(borders) == ENTROPY.count + 1 and borders[-1] == pytest.approx(math.log(151_936))
    assert borders[1] < 0.0015
    low, *rest = edges(LOGPROB_DIFFERENCE)
    assert (low, rest[0], rest[-1]) == (0.0, 1e-8, pytest.approx(100.0))
    assert max(b / a for a, b in pairwise(rest)) < 1.0057


def test_what_is_outside_is_in_the_bin_at_the_end_and_nan_in_none():
    values = torch.tensor([-1e-6, 0.0, 1e6, math.inf, math.nan])
    for bins in (ENTROPY, LOGPROB_DIFFERENCE):
        counts = counted(values, bins).counts
        assert (counts[0], counts[-1], sum(counts)) == (2, 2, 4)


def test_histograms_of_parts_add_up_to_that_of_the_whole():
    values = torch.linspace(0, 12, 999)
    whole = counted(values, ENTROPY)
    assert merge(counted(part, ENTROPY) for part in values.split(100)) == whole
    assert math.isnan(percentile(counted(values[:0], ENTROPY), 0.5))


def test_a_coarse_histogram_keeps_all_values_within_its_borders():
    values = torch.linspace(1.0, 3.0, 500)
    borders, counts = coarse(counted(values, ENTROPY), most=512)
    assert len(borders) == len(counts) + 1 < 100 and sum(counts) == 500
    assert borders[0] <= 1.0 < borders[1] and borders[-2] < 3.0 <= borders[-1]
    assert coarse(counted(values[:0], ENTROPY), most=512) == ([], [])
