r"""Expressions that are too heavy to compare. In: a tidied text. Out: whether reading or computing
it could take a machine's memory, or minutes. By its signs alone: nothing is computed.

What passes may still take as long; this saves a process in most cases.
"""

import re

MAX_LENGTH = 500
MAX_DEPTH = 30
"""Of brackets within brackets."""
MAX_POWER = 5_000
"""Of a numeric exponent; also of what exponents of exponents come to."""
MAX_FACTORIAL = 1_000
MAX_NUM_POWERS = 60
MAX_NESTED_EXPONENTS = 3


def is_too_heavy(text: str) -> bool:
    return (
        len(text) > MAX_LENGTH
        or text.count("^") > MAX_NUM_POWERS
        or _HEAVY.search(text) is not None
        or any(int(match[1]) > MAX_FACTORIAL for match in _FACTORIAL.finditer(text))
        or _is_nested_badly(text)
        or _largest_exponent(_SUBSCRIPT.sub("", text)) > MAX_POWER
    )


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


_BRACKET = re.compile(r"\^?\s*\\?[({\[]|\\?[)}\]]")


def _is_nested_badly(text: str) -> bool:
    """Too deep, or a factorial of a group that is itself large: (5!)!, (10^3)!."""
    opened: list[tuple[int, bool]] = []
    for match in _BRACKET.finditer(text):
        if match[0][-1] in "({[":
            opened.append((match.end(), match[0].startswith("^")))
            if len(opened) > MAX_DEPTH or sum(power for _, power in opened) > MAX_NESTED_EXPONENTS:
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


def _largest_exponent(text: str) -> int:
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
