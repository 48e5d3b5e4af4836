"""Intervals: how often they hold the truth in simulations, and against scipy's own."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from megatron_eopd.evaluation import intervals as module
from megatron_eopd.evaluation.estimators import pass_at_k
from megatron_eopd.evaluation.intervals import intervals, paired, wilson_interval

# Shapes: P problems, N samples of each, R repeated evaluations.

PASS_AT_8 = np.array([pass_at_k(8, c, 8) for c in range(9)])


def evaluations(
    generator: np.random.Generator, shape: tuple[int, int], a: float, b: float
) -> np.ndarray:
    """[R, P] right samples of 8, of problems whose own rates are Beta(a, b)."""
    return generator.binomial(8, generator.beta(a, b, shape))


def one(values: np.ndarray, **options: object) -> tuple[float, float]:
    return intervals({"x": values}, {"x": 1.0}, **{"seed": 1, **options})["x"]


@pytest.mark.parametrize("num_problems", [30, 200])
@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1, 3)])
def test_intervals_hold_the_truth_in_95_percent_of_evaluations(num_problems, a, b):
    """Of problems that are mostly easy or hard, and of hard ones; for the share right and pass@8.

    The bounds are three standard errors of a share of 95 % in 400 repetitions.
    """
    rates = np.random.default_rng(0).beta(a, b, 1_000_000)
    truth = {"avg@8": a / (a + b), "pass@8": 1 - ((1 - rates) ** 8).mean()}
    held = dict.fromkeys(truth, 0)
    for right_P in evaluations(np.random.default_rng(1), (400, num_problems), a, b):
        values = {"avg@8": right_P / 8, "pass@8": PASS_AT_8[right_P]}
        found = intervals(values, dict.fromkeys(values, 1.0), seed=1, num_draws=1000)
        for name, (low, high) in found.items():
            held[name] += low <= truth[name] <= high
    for name, count in held.items():
        assert 0.917 <= count / 400 <= 0.983, name


def test_bootstrap_is_scipys_bca():
    """The same ends but for the draws' own noise, on values so skewed that its corrections move
    each end by several times the tolerance."""
    values_P = np.random.default_rng(3).exponential(size=15) ** 2
    values_P /= values_P.std()
    reference = stats.bootstrap((values_P,), np.mean, n_resamples=50_000, rng=1, method="BCa")
    draws = module._draws(15, 50_000, np.random.default_rng(1))
    offset_P = values_P - values_P.mean()
    offset_D = np.concatenate([weights_DP @ offset_P / 15 for weights_DP in draws])
    found = values_P.mean() + module._bca(offset_P, offset_D, z=1.959964)
    assert found == pytest.approx(reference.confidence_interval, abs=0.03)


def test_a_problem_weighs_the_same_however_many_samples_it_has():
    """More samples of the same problems leave the width between problems as it is."""
    rates_P = np.random.default_rng(4).uniform(size=50)
    widths = []
    for n in (8, 8000):
        right_P = np.random.default_rng(5).binomial(n, rates_P)
        low, high = one(right_P / n)
        widths.append(high - low)
    assert widths[1] > 0.8 * widths[0]


def test_all_alike_still_has_a_width():
    """All wrong, all right, one problem: what thirty or one can say, and inside the range."""
    low, high = one(np.zeros(30))
    assert (low, high) == pytest.approx((0.0, wilson_interval(0.0, 30)[1]))
    assert one(np.ones(30)) == pytest.approx((1 - high, 1.0))
    low, high = one(np.array([0.5]))
    assert low < 0.2 and high > 0.8
    assert intervals({"x": np.full(30, 512.0)}, {"x": 512.0}, seed=1)["x"][0] < 512


def test_one_problem_off_does_not_make_the_others_sure():
    """Between "none right" and "one, once" the interval does not collapse."""
    values_P = np.zeros(30)
    values_P[0] = 1 / 8
    assert one(values_P)[1] >= one(np.zeros(30))[1]


def test_problems_without_a_value_do_not_count():
    """The interval is that of the others alone, up to the draws."""
    values_P = np.random.default_rng(6).uniform(size=60)
    gaps_P = np.concatenate([values_P, np.full(60, np.nan)])
    assert one(gaps_P) == pytest.approx(one(values_P), abs=0.01)


def test_same_seed_same_interval():
    values_P = np.random.default_rng(7).uniform(size=30)
    assert one(values_P, seed=3) == one(values_P, seed=3) != one(values_P, seed=4)


def test_wilson_interval():
    """Against the published formula's values, and inside [0, 1]."""
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(1.0, 5)[1] <= 1.0


# --- paired -------------------------------------------------------------------------------------


def test_sign_flips_match_full_enumeration():
    """p over all 2^10 exchanges, to three standard errors of 20,000 random ones."""
    generator = np.random.default_rng(8)
    a_P, b_P = generator.uniform(size=10), generator.uniform(0.1, 1.1, size=10)
    sums = [abs(np.dot(signs, b_P - a_P)) for signs in product((-1, 1), repeat=10)]
    exact = np.mean(np.array(sums) >= abs((b_P - a_P).sum()) - 1e-9)
    assert paired(a_P, b_P, 1, num_draws=20_000).p_value == pytest.approx(exact, abs=0.01)


def test_a_planted_difference_is_found_and_held():
    """10 points on 200 problems: found nearly always, and inside 95 % of the intervals."""
    generator = np.random.default_rng(9)
    found, held = 0, 0
    for _ in range(200):
        rates_P = generator.beta(2, 3, 200) * 0.8
        a_P, b_P = (generator.binomial(8, rates_P + shift) / 8 for shift in (0.0, 0.1))
        pair = paired(a_P, b_P, 1, num_draws=1000)
        found += pair.p_value < 0.05
        held += pair.low <= 0.1 <= pair.high
    assert found >= 198
    assert 0.904 <= held / 200 <= 0.996


@pytest.mark.parametrize("num_problems", [30, 200])
def test_no_difference_is_found_in_5_percent(num_problems):
    """Two evaluations of one model, to three standard errors of 600 repetitions."""
    generator = np.random.default_rng(10)
    rates = generator.beta(2, 2, (600, num_problems))
    pairs = zip(generator.binomial(8, rates) / 8, generator.binomial(8, rates) / 8, strict=True)
    found = sum(paired(a_P, b_P, 1, num_draws=500).p_value < 0.05 for a_P, b_P in pairs)
    assert 0.023 <= found / 600 <= 0.077


def test_the_smallest_detectable_difference_is_found_in_80_percent():
    """What one pair says that a set can show, such sets do show."""
    generator = np.random.default_rng(11)
    noise = generator.normal(0, 0.3, (401, 60))
    size = paired(np.zeros(60), noise[0], 1).smallest_detectable * 0.3 / noise[0].std(ddof=1)
    found = [paired(np.zeros(60), x_P + size, 1, num_draws=500).p_value < 0.05 for x_P in noise]
    assert 0.73 <= np.mean(found[1:]) <= 0.87


def test_two_that_are_equal_leave_room_for_a_difference():
    """Thirty equal problems do not prove that no other differs."""
    pair = paired(np.ones(30), np.ones(30), 1)
    assert (pair.difference, pair.p_value) == (0.0, 1.0)
    assert pair.low == pytest.approx(-pair.high) and pair.high > 0.1
    assert pair.smallest_detectable > 0.1


def test_few_problems_show_nothing_however_large():
    """Of five, all better, p is 2/32 at best: never below 5 %."""
    pair = paired(np.zeros(5), np.ones(5), 1)
    assert pair.p_value > 0.05 and pair.smallest_detectable == np.inf
    assert pair.low <= 1.0 == pair.high


def test_pairs_without_a_value_on_one_side_are_left_out():
    """Not taken for 0, and other problems are refused."""
    a_P, b_P = np.array([0.1, np.nan, 0.3]), np.array([0.2, 0.9, 0.4])
    assert paired(a_P, b_P, 1).difference == pytest.approx(0.1)
    with pytest.raises(ValueError, match="the same problems"):
        paired(a_P, b_P[:2], 1)
    with pytest.raises(ValueError, match="no problem has a value in both"):
        paired(a_P[1:2], b_P[1:2], 1)
