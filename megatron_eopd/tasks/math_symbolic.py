r"""Expressions, by math-verify and sympy. In: two tidied texts. Out: whether they are equal.

Reading is in math_parser, comparing in math_equality and math_points; nothing else imports sympy.
Slow on purpose: this is for what no shorter way decides. What it is given may run for ever, in C
too; who calls it must be able to end the process.
"""

import logging
from fractions import Fraction
from typing import Any

import sympy
from math_verify import verify

from megatron_eopd.tasks.math_equality import are_equal
from megatron_eopd.tasks.math_number import Quantity, read_quantity, rounds
from megatron_eopd.tasks.math_parser import has_two_numbers, read_expression

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of time-outs that are off

_UNEVALUATED = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)


def same_expression(gold: str, answer: str, tolerance: Fraction = Fraction(0)) -> bool | None:
    """None: the answer cannot be read. `verify` is not symmetric: the gold answer comes first."""
    if has_two_numbers(answer):
        return False
    parsed = read_expression(answer)
    if parsed is None:
        return None
    expected = read_expression(gold)
    if expected is None:
        return False
    if all(isinstance(e, sympy.Expr) and not e.has(*_UNEVALUATED) for e in (expected, parsed)):
        agree = are_equal(expected, parsed)
    else:
        agree = verify(expected, parsed, timeout_seconds=None)
    if agree:
        return True
    if tolerance:
        values = _as_fraction(expected), _as_fraction(parsed)
        return None not in values and abs(values[0] - values[1]) <= tolerance
    return _rounds_other(gold, answer, expected, parsed)


def _rounds_other(gold: str, answer: str, expected: Any, parsed: Any) -> bool:
    """Whether one of them is a long decimal of the other."""
    pairs = ((read_quantity(gold), parsed), (read_quantity(answer), expected))
    for quantity, other in pairs:
        if quantity is not None and quantity.significant is not None:
            value = _as_fraction(other)
            return value is not None and _is_rounded(quantity, value)
    return False


def _is_rounded(quantity: Quantity, value: Fraction) -> bool:
    return rounds(quantity, value + Fraction(1, 3 * 10**40))  # as irrational numbers are


def _as_fraction(expression: Any) -> Fraction | None:
    try:
        value = sympy.N(expression, 40)
        return Fraction(str(value)) if value.is_Float and value.is_finite else None
    except (AttributeError, TypeError, ValueError):
        return None


def canonical_expression(text: str) -> str | None:
    """One spelling of equal expressions, as far as sympy evaluates them by itself."""
    parsed = read_expression(text)
    if not isinstance(parsed, sympy.Expr) or parsed.has(*_UNEVALUATED):
        return None
    try:
        return sympy.sstr(parsed.doit())
    except Exception:  # whatever a model's text makes sympy meet; the text itself will do
        return None


def warm_up() -> None:
    """Fill the parser's caches, which takes most of the first second."""
    for text in (r"\frac{x^{2}+1}{\sqrt{3}}", r"(2a-b)\cdot 3^{n-1}", "y=2x-3", r"\sin(\pi x)+1.5"):
        same_expression(text, text + "+0")
