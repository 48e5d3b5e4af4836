"""Values of expressions, in many digits. In: two of sympy's. Out: whether they differ at
a point, or agree in more digits than they are long.

Values at points prove that two expressions differ, in a millisecond for most. They never prove that
two are equal: 2^{100} and 2^{100} - 1 agree in 30 digits, |x| and x at each positive point.
"""

import zlib
from typing import Any

import mpmath
import sympy

_DIGITS, _BITS = 30, 110
_DIFFERENT = 1e-20
"""Relative, of values with all their digits right."""
_MORE_DIGITS, _MOST_DIGITS = 100, 10_000
PIECEWISE = (
    sympy.Abs,
    sympy.Max,
    sympy.Min,
    sympy.floor,
    sympy.ceiling,
    sympy.sign,
    sympy.Mod,
    sympy.Piecewise,
)
"""Functions that jump, or have a corner."""
_FAILURES = (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError)
"""Of sympy, with what nobody can evaluate."""


def point_of(symbols: list[Any], number: int, *expressions: Any) -> dict[Any, Any]:
    """Fractions, then whole numbers, of both signs, small ones first."""
    has_powers = any(
        power.exp.free_symbols for e in expressions for power in e.atoms(sympy.Pow, sympy.exp)
    )
    scale = (2, 7, 60)[number % 3] if not has_powers else (2, 3, 5)[number % 3]
    return {symbol: _coordinate(symbol, number, scale) for symbol in symbols}


def _coordinate(symbol: Any, number: int, scale: int) -> Any:
    digest = zlib.crc32(f"{symbol.name} {number}".encode())
    is_whole = symbol.is_integer or number % 4 in (2, 3)
    is_negative = number % 2 if number < 4 else digest & 1
    size = 1 + digest // 2 % (scale * 97)
    value = sympy.Integer(1 + size // 97) if is_whole else sympy.Rational(size, 97)
    return -value if is_negative and not symbol.is_positive else value


def differ_at(point: dict[Any, Any], first: Any, second: Any) -> bool | None:
    """None where they cannot be compared."""
    try:
        values = [_value(e, point) for e in (first, second)]
    except _FAILURES:
        return None
    if any(value.is_finite is False for value in values):  # 1/0, and infinity itself
        both = all(value.is_finite is False for value in values)
        return values[0] != values[1] if both or not point else None
    if point and not first.has(sympy.I) and not second.has(sympy.I):
        pairs = zip((first, second), values, strict=True)
        defined = [_is_defined(expression, point, value) for expression, value in pairs]
        if not all(defined):  # \ln x for \ln|x| is wrong, 2\ln x for \ln x^2 is not
            return (any(defined) and (first.has(*PIECEWISE) or second.has(*PIECEWISE))) or None
    one, other = map(_as_mpmath, values)
    return abs(one - other) > _DIFFERENT * max(abs(one), abs(other))


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """strict: raises where the digits are not all right."""
    return expression.evalf(_DIGITS, subs=point, strict=True)


def _is_defined(expression: Any, point: dict[Any, Any], value: Any) -> bool:
    """In real numbers, all of its roots and logarithms included."""
    insides = [power.base for power in expression.atoms(sympy.Pow) if not power.exp.is_Integer]
    insides += [log.args[0] for log in expression.atoms(sympy.log)]
    numbers = [inside.evalf(_DIGITS, subs=point) for inside in insides if inside.free_symbols]
    return bool(value.is_real) and not any(number.is_negative for number in numbers)


def _as_mpmath(value: Any) -> Any:
    real, imaginary = value.as_real_imag()
    return mpmath.mpc(real._to_mpmath(_BITS), imaginary._to_mpmath(_BITS))


def is_surely_nonzero(difference: Any, point: dict[Any, Any]) -> bool:
    """However small it is beside what it is a difference of."""
    try:
        value = difference.evalf(2, subs=point, maxn=_MORE_DIGITS, strict=True)
    except _FAILURES:
        return False
    return value.is_finite is not False and value.is_zero is False


def agree_in_many_digits(first: Any, second: Any) -> bool:
    """Two numbers, in more digits than they are long, and 50 more: nothing that is written in so
    few signs comes so near to another number by chance."""
    try:
        digits = _MORE_DIGITS + 2 * (_num_digits(first) + _num_digits(second))
        values = [sympy.N(number, digits, maxn=2 * digits) for number in (first, second)]
        distance = abs(values[0] - values[1])
        return digits <= _MOST_DIGITS and bool(distance < sympy.Float(10) ** (-digits // 2))
    except _FAILURES:
        return False


def _num_digits(number: Any) -> int:
    """Digits before and behind the point, at most, of powers of numbers below 1,000."""
    exponents = [power.as_base_exp()[1] for power in number.atoms(sympy.Pow, sympy.exp)]
    bits = [part.p.bit_length() + part.q.bit_length() for part in number.atoms(sympy.Rational)]
    return sum(bits) // 3 + sum(3 * int(abs(sympy.N(exponent))) for exponent in exponents)
