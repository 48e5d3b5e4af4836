r"""Expressions from LaTeX. In: a tidied text. Out: what sympy makes of it, or None.

By math-verify's parser, which errs with some spellings; those are rewritten before, or refused. May
run for ever, as all that computes with sympy.
"""

import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig

from megatron_eopd.tasks.math_heavy import is_too_heavy
from megatron_eopd.tasks.math_number import read_quantity

# Units are off by now; it would take the m of 5m for one.
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
# It would take 2(3) for a mixed number, and R for r.
_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)


@lru_cache(maxsize=512)
def read_expression(text: str) -> Any:
    """None where it is too heavy, or cannot be read."""
    if is_too_heavy(text) or not text.isascii() or _DIVISOR_OF_LETTERS.search(text):
        return None
    quantity = read_quantity(text)
    if quantity is not None:  # exactly: the parser makes floats of decimals
        return sympy.Rational(quantity.value.numerator, quantity.value.denominator)
    try:
        return latex2sympy(
            _rewritten(text),
            is_real=True,
            normalization_config=_NORMALIZATION,
            conversion_config=_CONVERSION,
        )
    except Exception:  # whatever a model's text makes the parser meet
        return None


def has_two_numbers(text: str) -> bool:
    """Side by side: the parser adds 1 and 2 of 1 2."""
    return _TWO_NUMBERS.search(_rewritten(text)) is not None


_DIVISOR_OF_LETTERS = re.compile(r"(?:gcd|lcm)[^a-zA-Z]*[a-zA-Z]")
"""The parser computes the one of a and b, and finds 1."""
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<![a-zA-Z\\])C\(([^(),]{1,40}),([^(),]{1,40})\)", r"\\binom{\1}{\2}"),
        (r"\*", r"\\cdot "),
        (r"\{(\\lfloor[^{}]*\\rfloor)\s*\}\s*!", r"(\1)!"),
        (r"\\pi\s*\(", r"\\pi \\cdot ("),  # no function
        # Two numbers side by side are no mixed number, which the parser makes of them.
        (r"(?<![\w.])(\d+)\s*(?=[(\[]|\\(?:frac|sqrt|binom|lfloor|lceil)(?![a-z]))", r"\1\\cdot "),
        (r"\)\s*\(", r")\\cdot ("),
    )
]
_MIXED = re.compile(r"(?<![\d.,_^a-zA-Z])(\d+)(?:\s*\\frac\{(\d+)\}\{(\d+)\}|\s+(\d+)/(\d+))")
_TWO_NUMBERS = re.compile(r"(?<![\d_.])\d[\d.]*\s+\d")
_DECIMAL = re.compile(r"(?:(?<![\d,])\d{1,3}(?:,\d{3})+|\d*)\.\d+")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?|[a-zA-Z])\s*\^\\circ")


def _rewritten(text: str) -> str:
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])", text):
        text = _DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    # The parser makes floats of decimals.
    text = _DECIMAL.sub(_exact_decimal, _MIXED.sub(_sum_of_mixed, text))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _sum_of_mixed(match: re.Match[str]) -> str:
    top, bottom = match[2] or match[4], match[3] or match[5]
    if int(top) >= int(bottom):
        return match[0]
    return rf"({match[1]}+\frac{{{top}}}{{{bottom}}})"


def _exact_decimal(match: re.Match[str]) -> str:
    whole, _, decimals = match[0].replace(",", "").partition(".")
    return rf"(\frac{{{int(whole + decimals)}}}{{1{'0' * len(decimals)}}})"
