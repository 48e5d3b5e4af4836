"""Graders. In: the answers of problems, and the texts that a model wrote to each. Out: marks.

A text is None where the response was cut before it ended: never right.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from megatron_eopd.data import countdown

Texts = Sequence[Sequence[str | None]]


class Graded(NamedTuple):
    """`[i][j]` is sample j of problem i."""

    correct: list[list[bool]]
    canonical: list[list[str]]
    """The spelling under which equal answers are equal; empty where the sample is wrong."""
    num_valid: list[int] | None
    """How many right answers each problem has, where that is known."""


def grade_countdown(answers: Sequence[str], texts: Texts) -> Graded:
    problems = [countdown.Problem.from_answer(answer) for answer in answers]
    correct = [
        [t is not None and countdown.verify(problem, t) for t in own]
        for problem, own in zip(problems, texts, strict=True)
    ]
    canonical = [
        [countdown.canonical(t) if mark else "" for mark, t in zip(marks, own, strict=True)]
        for marks, own in zip(correct, texts, strict=True)
    ]
    return Graded(correct, canonical, [countdown.num_valid_traces(p) for p in problems])


def grade_last_number(answers: Sequence[str], texts: Texts) -> Graded:
    """Right is a text whose last number is the last number of the answer: enough for GSM8K and its
    like, whose answers are numbers; not for fractions, expressions or words."""
    golds = [gold_number(answer) for answer in answers]
    found = [[last_number(t or "") for t in own] for own in texts]
    correct = [
        [gold is not None and number == gold for number in own]
        for gold, own in zip(golds, found, strict=True)
    ]
    canonical = [
        [str(number.normalize()) if mark else "" for mark, number in zip(marks, own, strict=True)]
        for marks, own in zip(correct, found, strict=True)
    ]
    return Graded(correct, canonical, None)


# 1,234.5 or 1234.5 or .5; a minus sign counts where no number stands before it (3-2 ends in 2).
_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+")


def last_number(text: str) -> Decimal | None:
    """Of 18, 18.0 and 1,8 it is 18, 18 and 8. Exponents are not read: 1e5 ends in 5."""
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def gold_number(answer: str) -> Decimal | None:
    """The one number of an answer, behind its last #### where there is one; None where there is
    none or several, or an expression, whose last number would mean something else."""
    text = answer.rpartition("####")[2]
    numbers = _numbers(text)
    return numbers[0] if len(numbers) == 1 and not set(text) & set("/\\^") else None


def _numbers(text: str) -> list[Decimal]:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return [Decimal(number.replace(",", "")) for number in found]
