r"""Whether two answers are the same, as a careful person judges. In: the gold answer and another
one, both tidied. Out: yes, no, or None where the other cannot be read.

Numbers are compared exactly, here; only expressions reach sympy, and may then take for ever.
"""

import re
from fractions import Fraction

from megatron_eopd.tasks.math_number import same_quantity, units_agree
from megatron_eopd.tasks.math_text import squeeze
from megatron_eopd.tasks.math_values import (
    Equation,
    Expression,
    Items,
    Named,
    Value,
    Words,
    read,
    words_key,
)


def same_answer(gold: str, answer: str, tolerance: Fraction = Fraction(0)) -> bool | None:
    """tolerance: how far from the gold number another one may be."""
    if squeeze(gold) == squeeze(answer):
        return True
    letter, chosen = _LETTER_ALONE.fullmatch(gold), _CHOICE.match(answer)
    if letter and chosen:
        return letter[1].casefold() == (chosen[1] or chosen[2]).casefold()
    return _same(read(gold), read(answer), tolerance)


def canonical(answer: str) -> str:
    """Equal for equal answers, as far as that is cheap to know."""
    return _spell(read(answer))


def is_readable(gold: str) -> bool:
    """Whether an answer that is spelled in another way could be found to be the same; or the gold
    one has dots, and leaves it to the reader what they stand for."""
    return r"\dots" in gold or _is_readable(read(gold))


# (B), B) or B. before what it says; "A and B" and "a triangle" are no choices.
_LETTER_ALONE = re.compile(r"(?:\\text\{)?\s*\(?([A-Ja-j])\)?\s*\}?")
_CHOICE = re.compile(
    r"(?:\\text\{)?\s*(?:\(([A-Ja-j])\)|([A-J])[).:])(?:\s*\}\s*|\s+)(?!(?:\\text\{\s*)?(?:and|or)\b)."
)


def _same(gold: Value, answer: Value, tolerance: Fraction) -> bool | None:
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _same_words(gold, answer)
    if isinstance(gold, Named | Equation) or isinstance(answer, Named | Equation):
        return _same_equation(gold, answer, tolerance)
    if isinstance(gold, Items) or isinstance(answer, Items):
        return _same_items(_alone(gold), _alone(answer), tolerance)
    return _same_expression(gold, answer, tolerance)


def _same_words(gold: Value, answer: Value) -> bool:
    if not isinstance(gold, Words):
        return False
    key = answer.key if isinstance(answer, Words) else words_key(getattr(answer, "text", ""))
    return key == gold.key


def _same_equation(gold: Value, answer: Value, tolerance: Fraction) -> bool | None:
    if isinstance(gold, Named) and isinstance(answer, Named):
        return _same_name(gold.name, answer.name) and _same(gold.value, answer, tolerance)
    if isinstance(gold, Named | Equation) and isinstance(answer, Named | Equation):
        return _by_sympy(gold.text, answer.text)
    if isinstance(gold, Equation):  # a value is no equation
        return False
    if isinstance(gold, Named):
        return _same(gold.value, answer, tolerance)
    if isinstance(answer, Named):
        steps = [side for side in answer.between if _is_number(side)]
        return _all([_same(gold, side, tolerance) for side in (answer.value, *steps)])
    sides = [side for side in answer.sides if not _is_sum_of_letters(side)]
    if len(sides) < len(answer.sides) and not _is_number(gold):  # x + y = z, for z
        return False
    return _all([_same(gold, side, tolerance) for side in sides])


_COMMAND = re.compile(r"\\[a-zA-Z]+")
_SUM_OF_LETTERS = re.compile(r"[a-zA-Z](?:\+[a-zA-Z])+")


def _is_number(value: Value) -> bool:
    """Without letters."""
    text = _COMMAND.sub("", value.text) if isinstance(value, Expression) else "x"
    return re.search(r"[a-zA-Z]", text) is None


def _is_sum_of_letters(value: Value) -> bool:
    """m + n, which is asked for by its sum; the m of `m + 2 = 7` is another number than 7."""
    text = squeeze(value.text) if isinstance(value, Expression) else ""
    return _SUM_OF_LETTERS.fullmatch(text) is not None and len(set(text)) == len(text) // 2 + 2


_LETTER = re.compile(r"[a-zA-Z](?:_\w+)?|\\[a-z]+")
_FUNCTION = re.compile(r"[a-zA-Z]'*\([a-z]\)")
_WORD = re.compile(r"\\text\{.*\}|[A-Za-z]{3,}(?: [A-Za-z]+)*")
_DECORATION = re.compile(r"^m(?=\\)|\\(?:angle|overline|triangle|widehat)|[{}|\[\]]")


def _same_name(first: str, second: str) -> bool:
    """Of one unknown. f(x) may be called y; a word says what is asked for, and any other may."""
    names = [_DECORATION.sub("", name) for name in (first, second)]
    if names[0] == names[1] or any(_WORD.fullmatch(name) for name in (first, second)):
        return True
    return any(
        _FUNCTION.fullmatch(one) and _LETTER.fullmatch(other) for one, other in (names, names[::-1])
    )


# --- several ------------------------------------------------------------------------------------


def _alone(value: Value) -> Value:
    """A set of one is that one."""
    while isinstance(value, Items) and len(value.values) == 1 and not value.brackets:
        value = value.values[0]
    return value


def _same_items(gold: Value, answer: Value, tolerance: Fraction) -> bool | None:
    if not (isinstance(gold, Items) and isinstance(answer, Items)):
        both = not isinstance(gold, Items) and not isinstance(answer, Items)
        return _same(gold, answer, tolerance) if both else False
    if len(gold.values) != len(answer.values):
        return False
    gold, answer = _by_name(gold, answer), _by_name(answer, gold)
    if not gold.brackets and not answer.brackets:
        return _same_without_order(gold, answer, tolerance)
    if gold.brackets != answer.brackets:
        # (1, 2) may be written without brackets, in its order; {1, 2} is another thing.
        bare, other = (gold, answer) if gold.is_bare else (answer, gold)
        if not bare.is_bare or other.brackets != "()":
            return False
    return _all([_same(*pair, tolerance) for pair in zip(gold.values, answer.values, strict=True)])


_SINGLE = re.compile(r"[a-zA-Z]")


def _by_name(items: Items, other: Items) -> Items:
    """y = 2, x = 1 as the point (1, 2) that it is, where the other is a point without names."""
    names = [value.name for value in items.values if isinstance(value, Named)]
    if (
        other.brackets != "()"
        or len({*names}) != len(items.values)
        or not all(map(_SINGLE.fullmatch, names))
        or any(isinstance(value, Named) for value in other.values)
    ):
        return items
    return items._replace(values=tuple(sorted(items.values, key=lambda value: value.name)))


def _same_without_order(gold: Items, answer: Items, tolerance: Fraction) -> bool | None:
    left = list(answer.values)
    marks: list[bool | None] = []
    for value in gold.values:
        own = [_same(value, other, tolerance) for other in left]
        if True in own:
            left.pop(own.index(True))
        marks.append(True if True in own else None if None in own else False)
        if marks[-1] is False:
            break
    return _all(marks)


def _all(marks: list[bool | None]) -> bool | None:
    return False if False in marks else None if None in marks else True


# --- one ----------------------------------------------------------------------------------------

_NUMERAL = re.compile(r"([\da-zA-Z]*\d[\da-zA-Z]*)(?:_\{?(\d+)\}?)?")


def _same_expression(gold: Expression, answer: Expression, tolerance: Fraction) -> bool | None:
    if gold.quantity is not None and answer.quantity is not None:
        return same_quantity(gold.quantity, answer.quantity, tolerance)
    if not units_agree(gold.unit, answer.unit):
        return False
    texts = squeeze(gold.text), squeeze(answer.text)
    if texts[0] == texts[1]:
        return True
    if len(texts[0]) == 1 and texts[0].casefold() == texts[1].casefold():
        return texts[0] not in "iIeE"
    if "_" in texts[0] + texts[1]:
        numerals = [_NUMERAL.fullmatch(text) for text in texts]
        if all(numerals):  # 52_8 may be written as 52, not as 42
            bases = [numeral[2] for numeral in numerals]
            is_same = bases[0] == bases[1] or bases[1] is None or bases == [None, "10"]
            return numerals[0][1] == numerals[1][1] and is_same
    return _by_sympy(gold.text, answer.text, tolerance)


def _by_sympy(gold: str, answer: str, tolerance: Fraction = Fraction(0)) -> bool | None:
    # Here, not above: it takes half a second and 50 MB, and most answers do without.
    from megatron_eopd.tasks.math_symbolic import same_expression

    return same_expression(gold, answer, tolerance)


def _is_readable(value: Value) -> bool:
    if isinstance(value, Words):
        return True
    if isinstance(value, Named):
        return _is_readable(value.value)
    if isinstance(value, Items):
        return all(map(_is_readable, value.values))
    is_one = isinstance(value, Expression)
    if is_one and (value.quantity is not None or _NUMERAL.fullmatch(squeeze(value.text))):
        return True
    from megatron_eopd.tasks.math_parser import read_expression

    return read_expression(value.text) is not None


def _spell(value: Value) -> str:
    if isinstance(value, Words):
        return value.key
    if isinstance(value, Named):
        return _spell(value.value)
    if isinstance(value, Equation):
        return squeeze(value.text)
    if isinstance(value, Items):
        spelled = [_spell(each) for each in value.values]
        opening, closing = value.brackets[:1], value.brackets[1:]
        return opening + ", ".join(spelled if opening else sorted(spelled)) + closing
    if value.quantity is not None:
        return f"{value.quantity.value}{'%' * value.quantity.is_percent}"
    from megatron_eopd.tasks.math_symbolic import canonical_expression

    return canonical_expression(value.text) or squeeze(value.text)
