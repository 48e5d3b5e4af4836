"""Whether two expressions are equal. In: two of sympy's. Out: yes; or no, also where
algebra cannot show that they are.

Values at points tell most of them apart (math_points). Equal takes algebra; of two numbers, where
algebra may take for ever, more digits than either is long.
"""

from typing import Any

import sympy

from megatron_eopd.tasks.math_points import (
    PIECEWISE,
    agree_in_many_digits,
    differ_at,
    is_surely_nonzero,
    point_of,
)

NUM_POINTS = 14


def are_equal(expected: Any, parsed: Any) -> bool:
    first, second = _with_same_symbols(expected, parsed)
    if first == second:
        return True
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    compared = []
    for number in range(NUM_POINTS if symbols else 1):
        point = point_of(symbols, number, first, second)
        mark = differ_at(point, first, second)
        if mark:
            return False
        compared += [point] if mark is False else []
    first, second = first.doit(), second.doit()
    difference = first - second
    if difference.is_Rational:
        return bool(difference == 0)
    if sympy.expand(difference) == 0:
        return True
    if not symbols:
        is_other = is_surely_nonzero(difference, {})
        return not is_other and agree_in_many_digits(first, second)
    if any(is_surely_nonzero(difference, point) for point in compared[:4]):
        return False
    return any(simplify(difference) == 0 for simplify in _SIMPLIFICATIONS)


def _simplify_by_force(difference: Any) -> Any:
    """As if all that stands in roots and logarithms were positive; where it is not, the values at
    points have been compared."""
    if difference.has(*PIECEWISE):
        return difference
    return sympy.simplify(sympy.powsimp(sympy.expand_log(difference, force=True), force=True))


def _simplify_exponentials(difference: Any) -> Any:
    return sympy.simplify(sympy.expand(difference.rewrite(sympy.exp)))


_SIMPLIFICATIONS = (sympy.simplify, _simplify_by_force, _simplify_exponentials)


def _with_same_symbols(*expressions: Any) -> list[Any]:
    """The parser's symbols differ in whether they are real. Here i is the imaginary unit; all
    others are real, positive where only positive numbers make sense, as a and b in \\sqrt{ab}, and
    whole numbers as n in (-1)^n."""
    positive = set().union(*map(_positive_symbols, expressions))
    positive -= set().union(*map(_symbols_of_piecewise, expressions))
    whole = set().union(*map(_integer_symbols, expressions))
    symbols = {
        name: sympy.Symbol(
            name,
            real=True,
            positive=name in positive or None,
            integer=name in whole or None,
        )
        for name in {s.name for e in expressions for s in e.free_symbols}
    } | {"i": sympy.I}
    return [
        _with_real_roots(e.xreplace({s: symbols[s.name] for s in e.free_symbols}))
        for e in expressions
    ]


def _with_real_roots(expression: Any) -> Any:
    """Its odd roots of negative numbers real, which sympy's are not."""
    roots = {
        power: (-1) ** power.exp.p * (-power.base) ** power.exp
        for power in expression.atoms(sympy.Pow)
        if power.exp.is_Rational and power.exp.q % 2 and power.exp.q > 1 and power.base.is_negative
    }
    return expression.xreplace(roots) if roots else expression


def _integer_symbols(expression: Any) -> set[str]:
    """In exponents of negative numbers, and where only whole numbers are counted."""
    powers = [power.exp for power in expression.atoms(sympy.Pow) if power.base.is_negative]
    powers += expression.atoms(sympy.factorial, sympy.binomial)
    return {symbol.name for power in powers for symbol in power.free_symbols}


def _positive_symbols(expression: Any) -> set[str]:
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


def _symbols_of_piecewise(expression: Any) -> set[str]:
    return {symbol.name for step in expression.atoms(*PIECEWISE) for symbol in step.free_symbols}
