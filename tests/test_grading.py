"""The last number of a text, and what follows from it."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eopd.evaluation.grading import gold_number, grade_last_number, last_number
from megatron_eopd.evaluation.pass_at_k import wilson_interval


@pytest.mark.parametrize(
    "text,expected",
    [
        ("The answer is 18.", "18"),
        ("#### 1,234", "1234"),
        ("$18.00", "18"),
        ("3-2", "2"),
        ("x = -5", "-5"),
        ("5 - -3", "-3"),
        ("so 1,8", "8"),
        ("12,34", "34"),
        (".5 of it", "0.5"),
        ("1,000,000 people", "1000000"),
        ("3*4*5=60!", "60"),
        ("9 apples, each of them red", "9"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == (None if expected is None else Decimal(expected))


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=0, max_value=10**9, places=3))
def test_a_number_is_found_however_it_is_written(number):
    for text in (f"{number}", f"{number:,}", f"= ${number}.", f"7 {number} eggs", f"**{number}**"):
        assert last_number(text) == number, text


def test_grades():
    """A cut response is wrong, and a problem whose answer has no number has no right one."""
    graded = grade_last_number(
        ["#### 1,000", "no number"], [["1000.0", "so 1,000 is it", None], ["no number", "1", None]]
    )
    assert graded.correct == [[True, True, False], [False, False, False]]
    first, second, wrong = graded.canonical[0]
    assert first == second != "" == wrong
    assert graded.num_valid is None


def test_wilson_interval():
    """Against published values: 0 of 10, and 81 of 263 (Newcombe 1998)."""
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(1.0, 5)[1] <= 1.0


@pytest.mark.parametrize(
    "answer,expected",
    [
        *(("18", 18), ("so 3 * 6 #### 1,018", 1018), ("$5", 5), ("\N{MINUS SIGN}5", -5)),
        *((text, None) for text in ("3/4", "five", "", "2 or 3", "2^5")),
    ],
)
def test_an_answer_is_one_plain_number(answer, expected):
    assert gold_number(answer) == expected


def test_long_numbers_are_compared_whole():
    long = "9" * 28
    assert grade_last_number([f"{long}1"], [[f"{long}2", f"{long}1"]]).correct == [[False, True]]
