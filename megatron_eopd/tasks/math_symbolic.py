r"""Expressions, by math-verify and sympy. In: two tidied texts. Out: whether they are equal.

The only module that imports them, and slow on purpose: it is for what no shorter way decides. What
it is given may run for ever, in C too; who calls it must be able to end the process.
"""

import logging
import re
import zlib
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath
import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from megatron_eopd.tasks.math_number import Quantity, read_quantity, rounds

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of time-outs that are off

MAX_LENGTH = 500
MAX_DEPTH = 30
"""Of brackets within brackets."""
MAX_POWER = 5_000
"""Of a numeric exponent; also of what exponents of exponents come to."""
MAX_FACTORIAL = 1_000

_FORMULAS_ALONE = [
    LatexExtractionConfig(
        boxed_match_priority=-1,
        # Units are off by now; it would take the m of 5m for one.
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        ),
    )
]


def same_expression(gold: str, answer: str, tolerance: Fraction = Fraction(0)) -> bool | None:
    """None: the answer cannot be read. `verify` is not symmetric: the gold answer comes first."""
    parsed = read_expression(answer)
    if parsed is None:
        return None
    expected = read_expression(gold)
    if expected is None:
        return False
    agree = _agree_in_value(expected, parsed)
    if agree is None:
        agree = verify(expected, parsed, timeout_seconds=None)
    if agree:
        return True
    if tolerance:
        values = _as_fraction(expected), _as_fraction(parsed)
        return None not in values and abs(values[0] - values[1]) <= tolerance
    return _rounds_other(gold, answer, expected, parsed)


_DIGITS, _BITS = 30, 110
_SAME, _DIFFERENT = 1e-20, 1e-9
"""Relative differences. What lies between them is the rounding of decimals in a formula."""
_NEARLY_ZERO = 1e-12


def _agree_in_value(expected: Any, parsed: Any) -> bool | None:
    """At two points, which tells most expressions apart in a millisecond; None where it does not,
    and sympy has to prove it."""
    if not all(isinstance(e, sympy.Expr) and not e.has(*_LONG_WORK) for e in (expected, parsed)):
        return None
    names = {symbol.name for symbol in expected.free_symbols | parsed.free_symbols}
    for point in range(1 + bool(names)):
        try:
            values = [_value(e, point) for e in (expected, parsed)]
            if any(value.is_finite is False for value in values):  # 1/0, and infinity itself
                return values[0] == values[1]
            first, second = map(_as_mpmath, values)
        except (ArithmeticError, AttributeError, TypeError, ValueError):
            return None
        size, difference = max(abs(first), abs(second)), abs(first - second)
        if not size > _NEARLY_ZERO:
            return None
        if difference > _DIFFERENT * size:
            return False
        if difference > _SAME * size:
            return None
    return True


def _value(expression: Any, point: int) -> Any:
    """strict: raises where the digits are not all right."""
    # By name: the parser's symbols differ in whether they are real.
    values = {s: _coordinate(s.name, point) for s in expression.free_symbols}
    return expression.evalf(_DIGITS, subs=values, strict=True)


def _as_mpmath(value: Any) -> Any:
    real, imaginary = value.as_real_imag()
    return mpmath.mpc(real._to_mpmath(_BITS), imaginary._to_mpmath(_BITS))


def _coordinate(name: str, point: int) -> Any:
    digest = zlib.crc32(f"{name} {point}".encode()) / 2**32
    return sympy.Float(0.5 + digest, _DIGITS)


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


@lru_cache(maxsize=512)
def read_expression(text: str) -> Any:
    """What sympy makes of it, or None."""
    if is_too_heavy(text) or not text.isascii():
        return None
    quantity = read_quantity(text)
    if quantity is not None:  # exactly: the parser makes floats of decimals
        return sympy.Rational(quantity.value.numerator, quantity.value.denominator)
    found = parse(
        f"${_for_parser(text)}$",
        _FORMULAS_ALONE,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return found[0] if found else None


def warm_up() -> None:
    """Fill the parser's caches, which takes most of the first second."""
    for text in (r"\frac{x^{2}+1}{\sqrt{3}}", r"(2a-b)\cdot 3^{n-1}", "y=2x-3", r"\sin(\pi x)+1.5"):
        same_expression(text, text + "+0")


_CHOOSE = re.compile(r"(?<![a-zA-Z\\])C\(([^(),]{1,40}),([^(),]{1,40})\)")


def _for_parser(text: str) -> str:
    return _CHOOSE.sub(r"\\binom{\1}{\2}", text).replace("*", r"\cdot ")


def canonical_expression(text: str) -> str | None:
    """One spelling of equal expressions, as far as sympy evaluates them by itself."""
    parsed = read_expression(text)
    if not isinstance(parsed, sympy.Expr) or parsed.has(*_LONG_WORK):
        return None
    try:
        return sympy.sstr(parsed.doit())
    except Exception:  # whatever a model's text makes sympy meet; the text itself will do
        return None


_LONG_WORK = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)


# --- what is not even tried ---------------------------------------------------------------------

_HEAVY = re.compile(
    r"!\s*!"  # of a factorial
    r"|\^\s*\{[^{}]*!"
    r"|\d{300}"
    r"|\^\s*\{\s*\d+\s*(?:\\cdot|\\times|\*)\s*\d+\s*\^"  # 9^{9 · 10^9}
    r"|\\d?binom\s*\{\d{5}"
    r"|\\(?:i?int|lim)(?![a-zA-Z])"  # work, not an answer
)
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\w)")
_FACTORIAL = re.compile(r"(\d+)\s*!")
_MANY_POWERS = 60
_MANY_STOREYS = 3
"""Exponents of exponents."""


def is_too_heavy(text: str) -> bool:
    """Whether computing it could take a machine's memory, or minutes. What passes may still do
    that; this saves a process in most cases."""
    return (
        len(text) > MAX_LENGTH
        or text.count("^") > _MANY_POWERS
        or _HEAVY.search(text) is not None
        or any(int(match[1]) > MAX_FACTORIAL for match in _FACTORIAL.finditer(text))
        or _is_nested_badly(text)
        or _largest_power(_SUBSCRIPT.sub("", text)) > MAX_POWER
    )


_BRACKET = re.compile(r"\^?\s*\\?[({\[]|\\?[)}\]]")


def _is_nested_badly(text: str) -> bool:
    """Too deep, or a factorial of a group that is itself large: (5!)!, (10^3)!."""
    opened: list[tuple[int, bool]] = []
    for match in _BRACKET.finditer(text):
        if match[0][-1] in "({[":
            opened.append((match.end(), match[0].startswith("^")))
            if len(opened) > MAX_DEPTH or sum(power for _, power in opened) > _MANY_STOREYS:
                return True
        elif opened:
            group = text[opened.pop()[0] : match.start()]
            is_large = set(group) & set("!^") or re.search(r"\d{4}", group)
            if is_large and text[match.end() :].lstrip().startswith("!"):
                return True
    return False


_POWER = re.compile(
    r"(?P<opening>[({\[])"
    r"|(?P<closing>[)}\]])"
    r"|\^\s*\{?\s*[-+]?\s*(?P<exponent>\d+(?:\s*\}?\s*\^\s*\{?\s*\d+)*)[\s}]*"
)


def _largest_power(text: str) -> int:
    """Of numeric exponents, with those of groups, ((a^9)^9)^9, multiplied."""
    largest = [1]  # within each bracket that is open
    closed = 1  # within the group that ends right here
    for match in _POWER.finditer(text):
        if match["opening"]:
            largest.append(1)
        elif match["closing"] and len(largest) > 1:
            closed = largest.pop()
            largest[-1] = max(largest[-1], closed)
        elif match["exponent"]:
            is_of_group = match.start() > 0 and text[match.start() - 1] in ")}]"
            power = _tower(match["exponent"]) * (closed if is_of_group else 1)
            largest[-1] = max(largest[-1], min(power, 10**9))
            closed = largest[-1]
    return max(largest)


def _tower(exponent: str) -> int:
    """2^3^2, without computing what is too large."""
    value = 1
    for digits in reversed(re.findall(r"\d+", exponent)):
        base = int(digits[:12])
        if base > 1 and value > 40:
            return MAX_POWER + 1
        value = base**value
    return value
