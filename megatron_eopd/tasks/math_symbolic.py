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
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

from megatron_eopd.tasks.math_number import Quantity, read_quantity, rounds

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of time-outs that are off

MAX_LENGTH = 500
MAX_DEPTH = 30
"""Of brackets within brackets."""
MAX_POWER = 5_000
"""Of a numeric exponent; also of what exponents of exponents come to."""
MAX_FACTORIAL = 1_000

# Units are off by now; it would take the m of 5m for one.
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
# It would take 2(3) for a mixed number, and R for r.
_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)


def same_expression(gold: str, answer: str, tolerance: Fraction = Fraction(0)) -> bool | None:
    """None: the answer cannot be read. `verify` is not symmetric: the gold answer comes first."""
    if _TWO_NUMBERS.search(_for_parser(answer)):  # the parser adds 1 and 2 of 1 2
        return False
    parsed = read_expression(answer)
    if parsed is None:
        return None
    expected = read_expression(gold)
    if expected is None:
        return False
    if all(isinstance(e, sympy.Expr) and not e.has(*_LONG_WORK) for e in (expected, parsed)):
        agree = _are_equal(expected, parsed)
    else:
        agree = verify(expected, parsed, timeout_seconds=None)
    if agree:
        return True
    if tolerance:
        values = _as_fraction(expected), _as_fraction(parsed)
        return None not in values and abs(values[0] - values[1]) <= tolerance
    return _rounds_other(gold, answer, expected, parsed)


# --- equal, or not ------------------------------------------------------------------------------
#
# Values at points prove that two expressions differ, in a millisecond for most. They never prove
# that two are equal: 2^{100} and 2^{100} - 1 agree in 30 digits, |x| and x at each positive point.
# That takes algebra; of two numbers, where algebra may take for ever, more digits than either is
# long.

_DIGITS, _BITS = 30, 110
_DIFFERENT = 1e-20
"""Relative, of values with all their digits right."""
_MORE_DIGITS, _MOST_DIGITS = 100, 10_000
_POINTS = 14
_STEPS = (
    sympy.Abs,
    sympy.Max,
    sympy.Min,
    sympy.floor,
    sympy.ceiling,
    sympy.sign,
    sympy.Mod,
    sympy.Piecewise,
)


def _are_equal(expected: Any, parsed: Any) -> bool:
    first, second = _with_same_letters(expected, parsed)
    if first == second:
        return True
    letters = sorted(first.free_symbols | second.free_symbols, key=str)
    compared = []
    for number in range(_POINTS if letters else 1):
        point = _point(letters, number, first, second)
        mark = _differ_at(point, first, second)
        if mark:
            return False
        compared += [point] if mark is False else []
    first, second = first.doit(), second.doit()
    difference = first - second
    if difference.is_Rational:
        return bool(difference == 0)
    if sympy.expand(difference) == 0:
        return True
    if not letters:
        is_other = _is_surely_not_zero(difference, {})
        return not is_other and _agree_in_many_digits(first, second)
    if any(_is_surely_not_zero(difference, point) for point in compared[:4]):
        return False
    return any(way(difference) == 0 for way in _WAYS)


def _force(difference: Any) -> Any:
    """As if all that stands in roots and logarithms were positive; where it is not, the values at
    points have been compared."""
    if difference.has(*_STEPS):
        return difference
    return sympy.simplify(sympy.powsimp(sympy.expand_log(difference, force=True), force=True))


def _with_exponentials(difference: Any) -> Any:
    return sympy.simplify(sympy.expand(difference.rewrite(sympy.exp)))


_WAYS = (sympy.simplify, _force, _with_exponentials)


def _with_same_letters(*expressions: Any) -> list[Any]:
    """The parser's symbols differ in whether they are real. Here i is the imaginary unit; all
    others are real, positive where only positive numbers make sense, as a and b in \\sqrt{ab}, and
    whole numbers as n in (-1)^n."""
    positive = set().union(*map(_letters_of_roots, expressions))
    positive -= set().union(*map(_letters_of_steps, expressions))
    whole = set().union(*map(_letters_of_signs, expressions))
    letters = {
        name: sympy.Symbol(
            name,
            real=True,
            positive=name in positive or None,
            integer=name in whole or None,
        )
        for name in {s.name for e in expressions for s in e.free_symbols}
    } | {"i": sympy.I}
    return [_real(e.xreplace({s: letters[s.name] for s in e.free_symbols})) for e in expressions]


def _real(expression: Any) -> Any:
    """Its odd roots of negative numbers real, which sympy's are not."""
    roots = {
        power: (-1) ** power.exp.p * (-power.base) ** power.exp
        for power in expression.atoms(sympy.Pow)
        if power.exp.is_Rational and power.exp.q % 2 and power.exp.q > 1 and power.base.is_negative
    }
    return expression.xreplace(roots) if roots else expression


def _letters_of_signs(expression: Any) -> set[str]:
    """In exponents of negative numbers, and where only whole numbers are counted."""
    powers = [power.exp for power in expression.atoms(sympy.Pow) if power.base.is_negative]
    powers += expression.atoms(sympy.factorial, sympy.binomial)
    return {letter.name for power in powers for letter in power.free_symbols}


def _letters_of_roots(expression: Any) -> set[str]:
    """Factors under a root, in a logarithm or under an unknown exponent, but for even powers."""
    insides = [log.args[0] for log in expression.atoms(sympy.log)]
    insides += [power.base for power in expression.atoms(sympy.Pow) if not power.exp.is_Integer]
    found = [factor.as_base_exp() for inside in insides for factor in _factors(inside)]
    return {base.name for base, power in found if base.is_Symbol and power.is_even is not True}


def _factors(product: Any) -> list[Any]:
    if product.is_Mul:
        return [factor for part in product.args for factor in _factors(part)]
    if product.is_Pow and product.exp == -1:
        return _factors(product.base)
    return [product]


def _letters_of_steps(expression: Any) -> set[str]:
    return {letter.name for step in expression.atoms(*_STEPS) for letter in step.free_symbols}


def _point(letters: list[Any], number: int, *expressions: Any) -> dict[Any, Any]:
    """Fractions, then whole numbers, of both signs, small ones first."""
    has_powers = any(
        power.exp.free_symbols for e in expressions for power in e.atoms(sympy.Pow, sympy.exp)
    )
    scale = (2, 7, 60)[number % 3] if not has_powers else (2, 3, 5)[number % 3]
    return {letter: _coordinate(letter, number, scale) for letter in letters}


def _coordinate(letter: Any, number: int, scale: int) -> Any:
    digest = zlib.crc32(f"{letter.name} {number}".encode())
    is_whole = letter.is_integer or number % 4 in (2, 3)
    is_negative = number % 2 if number < 4 else digest & 1
    size = 1 + digest // 2 % (scale * 97)
    value = sympy.Integer(1 + size // 97) if is_whole else sympy.Rational(size, 97)
    return -value if is_negative and not letter.is_positive else value


_FAILURES = (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError)
"""Of sympy, with what nobody can evaluate."""


def _differ_at(point: dict[Any, Any], first: Any, second: Any) -> bool | None:
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
            return (any(defined) and (first.has(*_STEPS) or second.has(*_STEPS))) or None
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


def _is_surely_not_zero(difference: Any, point: dict[Any, Any]) -> bool:
    """However small it is beside what it is a difference of."""
    try:
        value = difference.evalf(2, subs=point, maxn=_MORE_DIGITS, strict=True)
    except _FAILURES:
        return False
    return value.is_finite is not False and value.is_zero is False


def _agree_in_many_digits(first: Any, second: Any) -> bool:
    """Two numbers, in more digits than they are long, and 50 more: nothing that is written in so
    few signs comes so near to another number by chance."""
    try:
        digits = _MORE_DIGITS + 2 * (_length(first) + _length(second))
        values = [sympy.N(number, digits, maxn=2 * digits) for number in (first, second)]
        distance = abs(values[0] - values[1])
        return digits <= _MOST_DIGITS and bool(distance < sympy.Float(10) ** (-digits // 2))
    except _FAILURES:
        return False


def _length(number: Any) -> int:
    """Digits before and behind the point, at most, of powers of numbers below 1,000."""
    exponents = [power.as_base_exp()[1] for power in number.atoms(sympy.Pow, sympy.exp)]
    bits = [part.p.bit_length() + part.q.bit_length() for part in number.atoms(sympy.Rational)]
    return sum(bits) // 3 + sum(3 * int(abs(sympy.N(exponent))) for exponent in exponents)


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
    if is_too_heavy(text) or not text.isascii() or _DIVISOR_OF_LETTERS.search(text):
        return None
    quantity = read_quantity(text)
    if quantity is not None:  # exactly: the parser makes floats of decimals
        return sympy.Rational(quantity.value.numerator, quantity.value.denominator)
    try:
        return latex2sympy(
            _for_parser(text),
            is_real=True,
            normalization_config=_NORMALIZATION,
            conversion_config=_CONVERSION,
        )
    except Exception:  # whatever a model's text makes the parser meet
        return None


def warm_up() -> None:
    """Fill the parser's caches, which takes most of the first second."""
    for text in (r"\frac{x^{2}+1}{\sqrt{3}}", r"(2a-b)\cdot 3^{n-1}", "y=2x-3", r"\sin(\pi x)+1.5"):
        same_expression(text, text + "+0")


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


def _for_parser(text: str) -> str:
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
