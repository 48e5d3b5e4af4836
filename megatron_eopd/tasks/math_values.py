r"""What an answer is made of. In: a tidied text. Out: lists, tuples, intervals, sets, matrices,
equations and words, down to numbers and expressions. Nothing is computed.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_eopd.tasks.math_number import Quantity, read_quantity, split_unit
from megatron_eopd.tasks.math_text import squeeze

MAX_ITEMS = 50
"""Of a list; a longer one is taken for one expression."""
MAX_DEPTH = 8
"""Of lists within lists."""


class Expression(NamedTuple):
    text: str
    quantity: Quantity | None = None
    """Where it is a plain number."""
    unit: str = ""


class Words(NamedTuple):
    key: str
    """Equal for words that differ in case and punctuation only."""


class Items(NamedTuple):
    r"""Several values. Tuples and intervals have their brackets; 1, 2 and \{1, 2\} and unions have
    none, and no order."""

    values: tuple["Value", ...]
    brackets: str = ""
    """Also `matrix`."""
    is_bare: bool = False
    """1, 2: may be meant as (1, 2)."""


class Named(NamedTuple):
    r"""`x = 5`, `x \in [2, 3]` or `2 \le x \le 3`."""

    name: str
    value: "Value"
    text: str
    between: tuple["Value", ...] = ()
    """Of `x = 18/2 = 9` 18/2."""


class Equation(NamedTuple):
    """Of expressions; also a computation, 2 + 3 = 5."""

    text: str
    sides: tuple["Value", ...]


Value = Expression | Words | Items | Named | Equation

NOTHING = Words("no solution")
_NOTHING = re.compile(r"\\emptyset|\\\{\s*\\\}|(?:the )?empty set|no solutions?")

_CONJUNCTION = re.compile(r"\s*,?\s*\\text\{\s*,?\s*(?:and|or)\s*\}\s*|\s*,?\s+(?:and|or)\s+", re.I)


def read(text: str, depth: int = 0) -> Value:
    text = text.strip()
    quantity = read_quantity(text)
    if quantity is not None or depth > MAX_DEPTH:
        return Expression(text, quantity)
    text = text.replace(r"\$", "")
    if _NOTHING.fullmatch(_WRAPPED.sub(r"\1", text).strip().casefold()):
        return NOTHING
    for read_one in (
        _read_words,
        _read_list,
        _read_union,
        _read_inequality,
        _read_equation,
        _read_bracketed,
        _read_matrix,
        _read_plus_minus,
    ):
        value = read_one(text, depth + 1)
        if value is not None:
            return value
    exact = _split(text, (r"\approx",))[0]
    text, unit = split_unit(exact.strip())
    return Expression(text, read_quantity(text), unit)


def words_key(text: str) -> str:
    plain = _WRAPPED.sub(r" \1 ", text)
    return " ".join(re.sub(r"[^\w\s%/^+-]", " ", plain).casefold().split())


# --- words --------------------------------------------------------------------------------------

_WORD = re.compile(r"(?<![\\a-zA-Z])(?:[^\W\d_]{3,}|[Nn][Oo](?![a-zA-Z]))")
_WRAPPED = re.compile(r"\\text\{([^{}]*)\}")


def _read_words(text: str, depth: int) -> Words | None:
    r"""In \text, or long ones without it. Formulas have commands and signs."""
    plain = _WRAPPED.sub(r"\1", text)
    is_wrapped = plain != text and not _WRAPPED.sub("", text).strip(" ().,")
    if is_wrapped or (_WORD.search(plain) and not set(plain) & set("\\=<>^_+*/{}[]")):
        return Words(words_key(text)) if not _has_conjunction(text) else None
    return None


def _has_conjunction(text: str) -> bool:
    """1 and 2 is a list. Anything else with words in it is not."""
    parts = _CONJUNCTION.split(text)
    return len(parts) > 1 and not any(_WORD.search(part) for part in parts)


# --- several ------------------------------------------------------------------------------------


def _read_list(text: str, depth: int) -> Value | None:
    text = _CONJUNCTION.sub(", ", text)
    parts = _parts(text)
    return _collection(parts, depth) if 1 < len(parts) <= MAX_ITEMS else None


def _collection(parts: Sequence[str], depth: int) -> Items:
    """Without an order; of ± both values."""
    values: list[Value] = []
    for part in parts:
        value = read(part, depth)
        several = isinstance(value, Items) and value.is_bare
        values.extend(value.values if several else [value])
    return Items(tuple(values), is_bare=True)


def _read_union(text: str, depth: int) -> Value | None:
    parts = _split(text, (r"\cup",))
    if not 1 < len(parts) <= MAX_ITEMS:
        return None
    name, *first = _split(parts[0], (r"\in",))
    if len(first) != 1:
        return _collection(parts, depth)
    return Named(squeeze(name.strip()), _collection([*first, *parts[1:]], depth), text)


_BRACKETS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle"}
_SET_BUILDER = re.compile(r"\s*\w+(?:\s*\\in\s*\\mathbb\{R\})?\s*(?:\\mid|\||:)\s*(.*)", re.DOTALL)


def _read_bracketed(text: str, depth: int) -> Value | None:
    tokens = list(_tokens(text))
    if len(tokens) < 2 or tokens[0][0] not in _BRACKETS or tokens[-1][1] != 0:
        return None
    if any(level == 0 for _, level in tokens[:-1]):  # (a)(b): the first is closed before the end
        return None
    opening, closing = tokens[0][0], tokens[-1][0]
    inner = text[len(opening) : -len(closing)]
    if opening == r"\{" and (builder := _SET_BUILDER.fullmatch(inner)):
        return read(builder[1], depth)
    parts = _parts(inner)
    if opening == r"\{":
        several = _collection(parts, depth)
        return Items(tuple(dict.fromkeys(several.values)))
    if len(parts) == 1 and _BRACKETS[opening] == closing and opening in "({":
        return read(inner, depth)
    if not 1 < len(parts) <= MAX_ITEMS:
        return None
    brackets = "()" if opening == r"\langle" else opening + closing
    return Items(tuple(read(part, depth) for part in parts), brackets)


_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)


def _read_matrix(text: str, depth: int) -> Value | None:
    match = _MATRIX.fullmatch(text)
    if match is None or r"\begin" in match[2]:
        return None
    rows = [row.split("&") for row in re.split(r"\\\\", match[2]) if row.strip()]
    if not 0 < len(rows) <= MAX_ITEMS:
        return None
    values = [Items(tuple(read(cell, depth) for cell in row), "()") for row in rows]
    # A vector may be written as a tuple.
    if all(len(row) == 1 for row in rows):
        return Items(tuple(value.values[0] for value in values), "()")
    return Items(tuple(values), "matrix")


def _read_plus_minus(text: str, depth: int) -> Value | None:
    if re.search(r"\\[pm][pm](?![a-zA-Z])", text) is None:
        return None
    signs = ({"pm": "+", "mp": "-"}, {"pm": "-", "mp": "+"})
    both = [re.sub(r"\\(pm|mp)(?![a-zA-Z])", lambda m, s=s: s[m[1]], text) for s in signs]
    return Items(tuple(read(each, depth) for each in both), is_bare=True)


# --- relations ----------------------------------------------------------------------------------

_LETTER = r"(?:[a-zA-Z](?:_\{?\w{1,3}\}?)?|\\[a-z]+)"
_UNKNOWN = re.compile(
    rf"{_LETTER}'?|[a-zA-Z](?:\^\{{-1\}})?'{{0,2}}\s*\({_LETTER}(?:,\s*{_LETTER})*\)"
    r"|\\text\{[^{}]*\}|[A-Za-z]{3,}(?: [A-Za-z]+)*"
)
_NAME = re.compile(
    rf"{_UNKNOWN.pattern}"
    rf"|\({_LETTER}(?:\s*,\s*{_LETTER})+\)"
    # f(2), P(A \cap B); but x(x+1) is a product
    r"|[f-hpquvA-Z](?:_\{?\w{1,3}\}?)?(?:\^\{-1\})?'{0,2}\s*\([^()]{1,60}\)"
    rf"|\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\\angle\s*)?(?:[a-zA-Z]{{1,3}}|{_LETTER}|\({_LETTER}\))"
    r"|m?\s*\\(?:angle|overline|triangle|widehat)\s*\{?[A-Z]{1,4}\}?"
    r"|\|?[A-Z]{2,4}\|?|\[[A-Z]{3,5}\]"
    r"|\\(?:int|iint|lim|sum|prod)(?![a-zA-Z]).*",
    re.DOTALL,
)
"""What is asked for, where it stands on one side of an equation."""
_CONSTANTS = (r"\pi", r"\infty", r"\emptyset", "e", "i")
_MIRRORED = {">": "<", r"\ge": r"\le", "<": ">", r"\le": r"\ge"}


def _is_name(text: str, pattern: re.Pattern[str] = _NAME) -> bool:
    return pattern.fullmatch(text) is not None and text not in _CONSTANTS


def _read_inequality(text: str, depth: int) -> Value | None:
    """The interval that 2 < x ≤ 3 or x > 2 is; nothing of what is no interval of one unknown."""
    signs = [token for token, level in _tokens(text) if level == 0 and token in _MIRRORED]
    sides = [side.strip() for side in _split(text, tuple(_MIRRORED))]
    if not 1 <= len(signs) <= 2 or not all(sides) or len(sides) != len(signs) + 1:
        return None
    if signs[0] in (">", r"\ge"):  # from the lowest to the highest
        sides, signs = sides[::-1], [_MIRRORED[sign] for sign in signs[::-1]]
    if len(sides) == 2:
        is_upper = _is_name(sides[0], _UNKNOWN)
        sides = [r"-\infty", *sides] if is_upper else [*sides, r"\infty"]
        signs = ["<", *signs] if is_upper else [*signs, "<"]
    if not _is_name(sides[1], _UNKNOWN) or not set(signs) <= {"<", r"\le"}:
        return None
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    interval = Items((read(sides[0], depth), read(sides[2], depth)), brackets)
    return Named(squeeze(sides[1]), interval, text)


def _read_equation(text: str, depth: int) -> Value | None:
    for separator in ("=", r"\in", r"\approx"):
        sides = [side.strip() for side in _split(text, (separator,))]
        if len(sides) > 1:
            break
    if not 1 < len(sides) <= MAX_ITEMS or not all(sides):
        return None
    if _is_name(sides[-1]) and not _is_name(sides[0]):
        sides = sides[::-1]
    if not _is_name(sides[0]):
        return (
            Equation(text, tuple(read(side, depth) for side in sides)) if separator == "=" else None
        )
    value = read(sides[-1], depth)
    between = tuple(read(side, depth) for side in sides[1:-1] if not _is_name(side))
    names = [squeeze(side) for side in sides[:-1] if _is_name(side)]
    several = isinstance(value, Items) and value.is_bare  # x = ±1
    values = value.values if several else [value]
    named = [Named(name, each, text, between) for name in names for each in values]
    return named[0] if len(named) == 1 else Items(tuple(named), is_bare=True)


# --- brackets -----------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\text\{[^{}]*\}|\\(?:begin|end)\{\w+\*?\}|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_CLOSING = frozenset(_BRACKETS.values())
_THOUSANDS = re.compile(r"\d{3}(?!\d)")


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """(token, how many brackets are open behind it). Of (1, 2] the brackets are a pair, too."""
    level = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        level += token in _BRACKETS or token.startswith(r"\begin{")
        level -= token in _CLOSING or token.startswith(r"\end{")
        yield token, level


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """At those outside of brackets."""
    parts, start, position = [], 0, 0
    for token, level in _tokens(text):
        if level == 0 and token in separators:
            parts.append(text[start:position])
            start = position + len(token)
        position += len(token)
    return [*parts, text[start:]]


def _parts(text: str) -> list[str]:
    """Of a list. Where commas have spaces behind them, one without is of 1,000."""
    parts = _split(text, (";",))
    if len(parts) == 1:
        parts = _split(text, (",",))
    if len(parts) > 1 and any(part.startswith(" ") for part in parts[1:]):
        joined = parts[:1]
        for part in parts[1:]:
            if joined[-1][-1:].isdigit() and _THOUSANDS.match(part):
                joined[-1] += f",{part}"
            else:
                joined.append(part)
        parts = joined
    return [part for part in parts if part.strip()]
