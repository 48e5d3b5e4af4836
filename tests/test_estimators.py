"""Figures against their definitions: the mean over every way to draw k of the n samples."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eopd.evaluation.estimators import (
    Outcome,
    figures,
    highest,
    maj_at_k,
    pass_at_k,
    pass_hat_k,
    per_problem,
)

Samples = Sequence[tuple[str, str]]
"""(verdict, canonical spelling) of each."""


def outcome(samples: Samples, **others: object) -> Outcome:
    n = len(samples)
    verdicts, canonical = zip(*samples, strict=True)
    plain = Outcome(verdicts, canonical, (None,) * n, (1,) * n, (False,) * n, None)
    return plain._replace(**others)


def mean_over_draws(samples: Samples, k: int, value: Callable[[Samples], float]) -> float:
    draws = [value(draw) for draw in combinations(samples, k)]
    return sum(draws) / len(draws)


def vote(draw: Samples) -> float:
    """Chance that the answer with the most votes is right, the first ones sharing it."""
    votes = Counter(text for _, text in draw if text)
    winners = [text for text, count in votes.items() if count == max(votes.values())]
    return sum(("right", text) in draw for text in winners) / max(len(winners), 1)


def graded(texts: Sequence[str]) -> Samples:
    """Answers a and b are right, the others wrong."""
    return [("right" if t in ("a", "b") else "wrong" if t else "no answer", t) for t in texts]


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_and_pass_hat_k_are_shares_of_draws(n):
    """Some right, and all right, counted over all draws of k samples, for every c and k."""
    for c in range(n + 1):
        samples = [("right", "a")] * c + [("wrong", "x")] * (n - c)
        for k in range(1, n + 1):
            some = mean_over_draws(samples, k, lambda draw: ("right", "a") in draw)
            all_ = mean_over_draws(samples, k, lambda draw: ("wrong", "x") not in draw)
            assert pass_at_k(n, c, k) == pytest.approx(some, abs=1e-12)
            assert pass_hat_k(n, c, k) == pytest.approx(all_, abs=1e-12)


def test_pass_at_k_at_the_edges():
    """k = 1 is the accuracy, k = n asks for any right sample, large n stays exact."""
    assert pass_at_k(16, 4, 1) == 0.25 == pass_hat_k(16, 4, 1)
    assert pass_at_k(16, 0, 16) == 0.0
    assert pass_at_k(16, 1, 16) == 1.0
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_hat_k(10_000, 9_999, 100) == pytest.approx(0.99)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
@pytest.mark.parametrize("figure", [pass_at_k, pass_hat_k])
def test_impossible_counts_are_refused(figure, n, c, k):
    """More draws than samples has no unbiased estimate, so none is made up."""
    with pytest.raises(ValueError, match=rf"n={n}"):
        figure(n, c, k)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(["", "a", "b", "x", "y", "z"]), min_size=1, max_size=7))
def test_maj_at_k_is_the_mean_vote_over_all_draws(texts):
    """Whatever the sizes of the answers' classes, several of them right, some samples silent."""
    samples = graded(texts)
    for k in range(1, len(texts) + 1):
        brute = mean_over_draws(samples, k, vote)
        assert maj_at_k(outcome(samples), k) == pytest.approx(brute, abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from(["", *"aaabxxyzuvw"]), min_size=12, max_size=12))
def test_maj_at_k_of_more_samples(texts):
    """Twelve samples, many small answers beside a large one."""
    samples = graded(texts)
    for k in (3, 8, 11, 12):
        brute = mean_over_draws(samples, k, vote)
        assert maj_at_k(outcome(samples), k) == pytest.approx(brute, abs=1e-12)


def test_maj_at_k_by_hand():
    """Ties are shared, silence does not vote, and one sample's vote is its own."""
    assert maj_at_k(outcome(graded("ax")), 2) == pytest.approx(1 / 2)
    assert maj_at_k(outcome(graded("abx")), 3) == pytest.approx(2 / 3)
    assert maj_at_k(outcome(graded(["a", "", "", ""])), 4) == pytest.approx(1.0)
    assert maj_at_k(outcome(graded(["", ""])), 2) == 0.0
    assert maj_at_k(outcome(graded("aaax")), 1) == pytest.approx(3 / 4)


def test_an_answer_judged_both_ways_counts_by_its_share():
    """As where the grader ran out of time on one of two equal answers."""
    samples = [("right", "a"), ("timed out", "a"), ("wrong", "x")]
    assert maj_at_k(outcome(samples), 3) == pytest.approx(1 / 2)


@pytest.mark.parametrize("n", [300, 3000])
def test_maj_at_k_of_very_many_samples_neither_overflows_nor_vanishes(n):
    """Of two answers equally large, symmetry leaves half the chance to each."""
    half = outcome(graded("a" * (n // 2) + "x" * (n // 2)))
    assert maj_at_k(half, 5) == pytest.approx(1 / 2)
    assert maj_at_k(half, n if n < 1000 else 100) == pytest.approx(1 / 2)


def test_per_problem_by_hand():
    """Every name; wrong and repeated answers add nothing to distinct_correct."""
    first = outcome(
        [("right", "a"), ("right", "a"), ("right", "b"), ("wrong", "x")],
        second=(True, False, None, True),
        lengths=(2, 4, 6, 8),
        num_right=4,
    )
    second = outcome(
        [("no answer", ""), ("unparsable", ""), ("right", "a"), ("timed out", "")],
        cut=(True, False, False, False),
        num_right=1,
    )
    values = per_problem([first, second], [1, 2, 4])
    assert {name: pytest.approx(v.tolist(), nan_ok=True) for name, v in values.items()} == {
        "pass@1": [3 / 4, 1 / 4],
        "pass@2": [1, 1 / 2],  # of the second, 3 of 6 pairs hold its right sample
        "pass@4": [1, 1],
        "pass^2": [1 / 2, 0],  # of the first, 3 of 6 pairs leave its wrong sample out
        "pass^4": [0, 0],
        "avg@4": [3 / 4, 1 / 4],
        # Pairs aa; ab, ab; ax, ax; bx: 1, 1, 1, half, half, half. Of the second, a has 3 of 6.
        "maj@2": [(3 + 3 / 2) / 6, 1 / 2],
        "maj@4": [1, 1],
        "distinct@4": [3, 1],
        "distinct_correct@4": [2, 1],
        "coverage": [2 / 4, 1],
        "length_mean": [5, 1],
        "truncated_fraction": [0, 1 / 4],
        "verdict/right": [3 / 4, 1 / 4],
        "verdict/wrong": [1 / 4, 0],
        "verdict/no_answer": [0, 1 / 4],
        "verdict/unparsable": [0, 1 / 4],
        "verdict/timed_out": [0, 1 / 4],
        "grader_disagreement": [2 / 3, np.nan],
    }


def test_figures_weigh_problems_alike_and_leave_out_what_a_problem_has_not():
    """A mean over the problems that have a value, not over samples."""
    samples = [("right", "a"), ("wrong", "x")]
    both = [outcome(samples, second=(True, True)), outcome(samples), outcome([("wrong", "x")] * 2)]
    found = figures([both[0], both[1]._replace(num_right=2), both[2]], [1])
    assert found["pass@1"] == pytest.approx(1 / 3)
    assert found["grader_disagreement"] == pytest.approx(1 / 2)
    assert found["coverage"] == pytest.approx(1 / 2)


def test_what_nothing_is_known_of_is_left_out():
    """No second grader, no number of right answers; equal answers, where one has no spelling."""
    bare = [outcome([("right", ""), ("wrong", "x")])]
    names = set(per_problem(bare, [1, 2]))
    assert not {n for n in names if n.startswith(("maj", "distinct", "coverage", "grader"))}
    assert {"pass@2", "pass^2", "avg@2"} <= names


def test_highest_is_what_no_problem_exceeds():
    samples = [("right", "a"), ("right", "b"), ("wrong", "x")]
    values = per_problem([outcome(samples, lengths=(7, 7, 7), cut=(True,) * 3)], [3])
    tops = {name: highest(name, 7) for name in values}
    assert all(values[name].max() <= top for name, top in tops.items())
    assert (tops["distinct@3"], tops["length_mean"], tops["pass@3"]) == (3, 7, 1)


PLAIN = outcome([("right", "a"), ("wrong", "x")])


@pytest.mark.parametrize(
    ("outcomes", "ks", "told"),
    [
        ([PLAIN], [3], "k=3.*n=2"),
        ([PLAIN], [0], "k=0.*n=2"),
        ([], [1], "0 problems"),
        ([outcome([("right", "a")]), PLAIN], [1], r"\[1, 2\] samples"),
        ([PLAIN._replace(lengths=(1,))], [1], r"\[1, 2\] samples"),
        ([PLAIN._replace(verdicts=("right", "maybe"))], [1], "maybe"),
        ([PLAIN._replace(num_right=0)], [1], "num_right below 1"),
    ],
)
def test_what_does_not_match_is_refused(outcomes, ks, told):
    """A mean over ragged or misnamed samples would be a number about nothing."""
    with pytest.raises(ValueError, match=told):
        per_problem(outcomes, ks)
