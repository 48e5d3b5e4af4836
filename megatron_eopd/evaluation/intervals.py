"""How sure a figure is. In: its values, one for each problem. Out: 95 % intervals of the mean over
problems like these, and of the difference between two models on the same problems.

The problems are the draw: samples of one problem resemble each other, and more of them say nothing
about the next problem. So problems are resampled, each with all its samples.
"""

from collections.abc import Iterator, Mapping
from math import inf, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

# Shapes: P problems, F figures, D draws of P problems with replacement.

NUM_DRAWS = 10_000
FEWEST_DIFFERENT = 6
"""Problems that must differ from the commonest value before the bootstrap is trusted: of fewer it
has seen too little. Nor can fewer differences, were they all of one sign, reach p < 0.05."""
_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(0.975)
_Z_DETECTABLE = _Z + _NORMAL.inv_cdf(0.8)


class Paired(NamedTuple):
    """Of the mean of B − A over the problems that have a value in both."""

    difference: float
    low: float
    high: float
    p_value: float
    """Of no difference: how often one this large comes about when each problem's A and B are
    exchanged at random."""
    smallest_detectable: float
    """The true difference that such a set shows, at the 5 % level, in 80 % of evaluations; infinite
    below six problems, where none does."""


def intervals(
    values: Mapping[str, np.ndarray],
    highest: Mapping[str, float],
    *,
    seed: int,
    num_draws: int = NUM_DRAWS,
) -> dict[str, tuple[float, float]]:
    """95 % interval of each figure's mean; NaN stands for a problem without a value.

    By the BCa bootstrap (Efron 1987). Where fewer than six problems differ from the commonest
    value, as where all are right, it would be too narrow or have no width; there, the share of
    problems that differ is taken as large as it may be (Wilson 1927), and they as far off as they
    may be, between 0 and `highest`. That is honest and wide: 0 of 30 problems right is [0, 0.11].
    """
    if not values:
        return {}
    values_PF = np.stack(list(values.values()), axis=1)
    lowest_F, highest_F = np.zeros(len(values)), np.array([highest[name] for name in values])
    low_F, high_F = _intervals(values_PF, lowest_F, highest_F, seed, num_draws)
    both = zip(low_F.tolist(), high_F.tolist(), strict=True)
    return dict(zip(values, both, strict=True))


def paired(
    values_a: np.ndarray,
    values_b: np.ndarray,
    seed: int,
    *,
    highest: float = 1.0,
    num_draws: int = NUM_DRAWS,
) -> Paired:
    """B against A on the same problems in the same order; `highest` and NaN as in `intervals`.

    Raises:
        ValueError: arrays of other problems, or none with a value in both.
    """
    if values_a.shape != values_b.shape:
        raise ValueError(
            f"{values_a.shape} values against {values_b.shape}: give those of the same problems."
        )
    difference_P = (values_b - values_a)[~np.isnan(values_b - values_a)]
    if not len(difference_P):
        raise ValueError("no problem has a value in both. Give one at least.")
    edge_F = np.array([highest])
    low_F, high_F = _intervals(difference_P[:, None], -edge_F, edge_F, seed, num_draws)
    return Paired(
        float(difference_P.mean()),
        float(low_F[0]),
        float(high_F[0]),
        _sign_flip_p(difference_P, seed, num_draws),
        _smallest_detectable(difference_P, highest),
    )


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share seen in `count` independent trials (Wilson 1927), which
    keeps inside [0, 1] and has a width also where the share is 0."""
    spread = _Z / (1 + _Z * _Z / count)
    middle = (share + _Z * _Z / (2 * count)) / (1 + _Z * _Z / count)
    half = spread * sqrt(share * (1 - share) / count + _Z * _Z / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


# --- bootstrap ----------------------------------------------------------------------------------


def _intervals(
    values_PF: np.ndarray,
    lowest_F: np.ndarray,
    highest_F: np.ndarray,
    seed: int,
    num_draws: int,
) -> tuple[np.ndarray, np.ndarray]:
    known_PF = ~np.isnan(values_PF)
    # Offsets from the mean: a draw that equals the mean is then 0 to within rounding.
    offset_PF = np.where(known_PF, values_PF - np.nanmean(values_PF, axis=0), 0.0)
    offset_DF = np.concatenate(
        [
            # A draw without any value of a figure says nothing: it stays at the mean.
            weights_DP @ offset_PF / np.maximum(weights_DP @ known_PF, 1.0)
            for weights_DP in _draws(len(values_PF), num_draws, np.random.default_rng(seed))
        ]
    )
    ends = []
    for f, (lowest, highest) in enumerate(zip(lowest_F, highest_F, strict=True)):
        values = values_PF[known_PF[:, f], f]
        if few := _few_differ(values):
            commonest, share = few
            low = commonest - share * (commonest - lowest)
            high = commonest + share * (highest - commonest)
        else:
            z = _small_sample_z(len(values))
            low, high = values.mean() + _bca(offset_PF[:, f], offset_DF[:, f], z)
        ends.append((max(low, lowest), min(high, highest)))
    low_F, high_F = np.array(ends).T
    return low_F, high_F


def _draws(
    num_problems: int, num_draws: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """How often each problem is in each draw, some draws at a time to bound memory."""
    at_once = max(1, 2**21 // num_problems)
    for start in range(0, num_draws, at_once):
        size = min(at_once, num_draws - start)
        drawn = generator.integers(num_problems, size=(size, num_problems))
        drawn += np.arange(size)[:, None] * num_problems
        counts = np.bincount(drawn.ravel(), minlength=size * num_problems)
        yield counts.reshape(size, num_problems).astype(float)


def _small_sample_z(num_problems: int) -> float:
    """In place of 1.96. Means of drawn problems scatter less than means of new ones, by a factor of
    sqrt(1 - 1/P), and the width is itself an estimate, as in Student's t (Hesterberg 2015, The
    American Statistician 69). Without it 30 problems give 92 % intervals of a difference."""
    t = float(stdtrit(num_problems - 1, 0.975))
    return t * sqrt(num_problems / (num_problems - 1))


def _bca(offset_P: np.ndarray, offset_D: np.ndarray, z: float) -> np.ndarray:
    """[low, high] as offsets from the mean: the quantiles of the draws that, bias-corrected and
    accelerated, stand for -z and z standard errors."""
    tiny = 1e-12 * np.abs(offset_P).max()
    below = np.mean(offset_D < -tiny) + np.mean(np.abs(offset_D) <= tiny) / 2
    edge = 0.5 / len(offset_D)
    bias = _NORMAL.inv_cdf(min(max(below, edge), 1 - edge))
    # The jackknife's skewness, which for a mean is that of the values.
    acceleration = (offset_P**3).sum() / (6 * (offset_P**2).sum() ** 1.5)
    corners = [bias - z, bias + z]
    levels = [_NORMAL.cdf(bias + c / (1 - acceleration * c)) for c in corners]
    return np.quantile(offset_D, levels)


def _few_differ(values: np.ndarray) -> tuple[float, float] | None:
    """(the commonest value, the largest share of problems that may differ from it) where too few
    were seen to."""
    # Rounded: differences of equal values are equal to within rounding.
    found, counts = np.unique(values.round(9), return_counts=True)
    different = len(values) - counts.max()
    if different >= FEWEST_DIFFERENT:
        return None
    return found[counts.argmax()], wilson_interval(different / len(values), len(values))[1]


# --- of a difference ----------------------------------------------------------------------------


def _sign_flip_p(difference_P: np.ndarray, seed: int, num_draws: int) -> float:
    generator, extreme = np.random.default_rng(seed), 0
    size = np.abs(difference_P.sum()) * (1 - 1e-9)  # equal sums count, whatever their rounding
    at_once = max(1, 2**21 // len(difference_P))
    for start in range(0, num_draws, at_once):
        shape = (min(at_once, num_draws - start), len(difference_P))
        signs = 1.0 - 2.0 * generator.integers(2, size=shape, dtype=np.int8)
        extreme += int(np.count_nonzero(np.abs(signs @ difference_P) >= size))
    # What was seen is one of the exchanges; without it p could be 0.
    return (extreme + 1) / (num_draws + 1)


def _smallest_detectable(difference_P: np.ndarray, highest: float) -> float:
    if len(difference_P) < FEWEST_DIFFERENT:
        return inf
    error = difference_P.std(ddof=1) / sqrt(len(difference_P))
    if few := _few_differ(difference_P):
        _, share = few
        error = max(error, highest * sqrt(share / len(difference_P)))
    return float(_Z_DETECTABLE * error)
