r"""A second grader, that shares nothing with the first but the box. In: gold answer, other answer.
Out: whether they are the same by spelling, or as plain numbers.

It errs towards no. How often the two disagree says how far a figure depends on the grader.
"""

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

MAX_LENGTH = 500


def same_spelling(gold: str, answer: str) -> bool:
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return gold == answer
    first, second = _plain(gold), _plain(answer)
    if first == second:
        return True
    numbers = _number(first), _number(second)
    return None not in numbers and numbers[0] == numbers[1]


def same_last_number(gold: str, response: str) -> bool:
    """By its words from the end on."""
    for word in reversed(response[-MAX_LENGTH:].split()):
        number = _number(re.sub(r"^[^\d.-]+|[^\d]+$", "", word.rpartition("=")[2]).replace(",", ""))
        if number is not None:
            return number == _number(gold.replace(",", "").strip("$ "))
    return False


_DROPPED = re.compile(
    r"\\left|\\right|\\[,;:! ]|\\%|%|\\\$|\$|\^\\circ|\^\{\\circ\}"
    r"|\\(?:text|mbox|mathrm|textbf)\b|\s"
)
_FRACTION = re.compile(r"\\[dtc]?frac(?:\{([^{}]*)\}|(\d))(?:\{([^{}]*)\}|(\d))")


def _plain(text: str) -> str:
    text = _FRACTION.sub(lambda m: f"({m[1] or m[2]})/({m[3] or m[4]})", text)
    text = re.sub(r"[{}]", "", _DROPPED.sub("", text)).rstrip(".").casefold()
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _number(text: str) -> Fraction | None:
    top, slash, bottom = re.sub(r"[()]", "", text).partition("/")
    if text.startswith("-(") and slash:
        top = "-" + top.lstrip("-")
    try:
        values = [Fraction(Decimal(part)) for part in ([top, bottom] if slash else [top])]
        return values[0] / values[1] if slash else values[0]
    except (InvalidOperation, OverflowError, ValueError, ZeroDivisionError):
        return None
