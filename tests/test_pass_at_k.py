"""pass@k against its definition, and what the summary averages over."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eopd.evaluation.pass_at_k import pass_at_k, summarize


@settings(deadline=None)
@given(st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(data):
    """1 - C(n-c, k)/C(n, k) equals counting over all subsets of k samples."""
    n = data.draw(st.integers(1, 9))
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    share = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_at_the_edges():
    """k = 1 is the accuracy, k = n asks for any correct sample, large n stays exact."""
    assert pass_at_k(16, 4, 1) == 0.25
    assert pass_at_k(16, 0, 16) == 0.0
    assert pass_at_k(16, 1, 16) == 1.0
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_impossible_counts_are_refused(n, c, k):
    """More draws than samples has no unbiased estimate, so none is made up."""
    with pytest.raises(ValueError, match=rf"n={n}"):
        pass_at_k(n, c, k)


def test_summary_by_hand():
    """Wrong and repeated samples add nothing to distinct_correct; problems weigh the same."""
    report = summarize(
        correct=[[True, True, True, False], [False, False, True, False]],
        canonical=[["a", "a", "b", "c"], ["d", "d", "e", "e"]],
        num_valid=[4, 1],
        ks=(1, 2, 4),
    )
    assert report == pytest.approx(
        {
            "pass@1": (3 / 4 + 1 / 4) / 2,
            "pass@2": (1 + 1 / 2) / 2,  # problem 2: 3 of the 6 pairs hold its correct sample
            "pass@4": 1.0,
            "avg@4": (3 / 4 + 1 / 4) / 2,
            "distinct_correct@4": (2 + 1) / 2,
            "coverage": (2 / 4 + 1 / 1) / 2,
        }
    )


def test_summary_without_known_answers_has_no_coverage():
    """Coverage needs the number of valid answers, which real maths does not give."""
    assert set(summarize([[True]], [["a"]], None, [1])) == {"pass@1", "avg@1", "distinct_correct@1"}


@pytest.mark.parametrize(
    ("correct", "canonical", "num_valid"),
    [
        ([], [], None),
        ([[]], [[]], None),
        ([[True], [True, False]], [["a"], ["a", "b"]], None),
        ([[True]], [["a"], ["b"]], None),
        ([[True]], [["a", "b"]], None),
        ([[True]], [["a"]], [1, 2]),
        ([[True]], [["a"]], [0]),
    ],
)
def test_lists_that_do_not_match_are_refused(correct, canonical, num_valid):
    """A mean over ragged or misaligned samples would be a number about nothing."""
    with pytest.raises(ValueError, match=r"Give"):
        summarize(correct, canonical, num_valid, [1])
