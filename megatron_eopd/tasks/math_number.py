r"""Numbers, exactly. In: a tidied text. Out: its value as a fraction, and what stands beside it.

Reads 1,234.5, \frac{3}{4}, 1\frac{4}{5}, 2 1/2, 6.72 \times 10^{-5}, 0.\overline{3}, 36 %, 1.5
\text{million}, \$5 and 15 \text{cm}^{2}.
"""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 1000
MAX_EXPONENT = 1000
"""Of ten. Larger numbers are compared by their spelling."""

CONVINCING_DIGITS = 6
"""A decimal with so many significant digits may stand for what it rounds: 0.333333 for 1/3."""


class Quantity(NamedTuple):
    value: Fraction
    is_percent: bool = False
    unit: str = ""
    """In the words of _UNITS where it is one of those."""
    significant: int | None = None
    """Digits of a number with a decimal point; None of all others, which are exact."""
    last_place: Fraction = Fraction(0)
    """What one more in its last digit would add."""


_DECIMAL = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = rf"(?:{_DECIMAL})"
_SIGNED = rf"[-+]?\s*{_NUMBER}"
_FORMS = [
    re.compile(rf"(?P<sign>[-+])?\s*{form}")
    for form in (
        rf"(?P<decimal>{_NUMBER})",
        rf"\\frac\{{(?P<top>{_SIGNED})\}}\{{(?P<bottom>{_SIGNED})\}}",
        rf"(?P<top>{_NUMBER})\s*/\s*(?P<bottom>{_NUMBER})",
        r"(?P<whole>\d+)\s*\\frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}",
        r"(?P<whole>\d+)\s+(?P<top>\d+)/(?P<bottom>\d+)",
        rf"(?:(?P<decimal>{_NUMBER})\s*(?:\\times|\\cdot|\*|x)\s*)?10\^\{{(?P<exponent>[-+]?\d+)\}}",
        rf"(?P<decimal>{_NUMBER})[eE](?P<exponent>[-+]?\d+)",
        r"(?P<decimal>\d*\.\d*)\\(?:overline|bar|dot)\{(?P<repeating>\d+)\}",
        r"(?P<decimal>\d*\.\d*?)(?P<repeating>\d)(?P=repeating){2,}\s*\\dots",
    )
]

_UNITS = {
    name: words.split()[0]
    for words in (
        "degree degrees deg",
        "radian radians rad",
        "cm centimeter centimeters centimetre centimetres",
        "mm millimeter millimeters millimetre millimetres",
        "km kilometer kilometers kilometre kilometres",
        "m meter meters metre metres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "g gram grams",
        "kg kilogram kilograms",
        "lb lbs pound pounds £",
        "oz ounce ounces",
        "s sec secs second seconds",
        "min mins minute minutes",
        "h hr hrs hour hours",
        "day days",
        "week weeks",
        "month months",
        "year years yr yrs",
        "dollar dollars usd us $",
        "cent cents ¢",
        "euro euros eur €",
        "yen ¥",
        "am",
        "pm",
        "mph",
        "unit units",
    )
    for name in words.split()
}
_MANY_WORDS = 4
_POWERS = {"square": "2", "sq": "2", "cubic": "3"}
_KNOWN = {
    f"{unit}{power}"
    for unit in {*_UNITS.values()} - {"unit"}
    for power in ("", *(f"^{digit}" for digit in range(10)))
}
_OTHER_NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty "
    "sixty seventy eighty ninety zero half halves third thirds fourth fourths fifth fifths "
    "sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth "
    "hundredths thousandth thousandths hundred hundreds thousand thousands million millions "
    "billion billions trillion trillions dozen dozens pi infinity squared cubed factorial root "
    "plus minus over divided multiplied mod modulo power base and or not than to between except "
    "if no none never cannot wrong incorrect false negative twice double triple"
)
_NO_UNITS = frozenset(_OTHER_NUMBERS.split())
"""Words that change the number before them, or say that it is none."""
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}

_POWER = r"(?:\s*\^\s*\{?(?P<power>\d)\}?)?"
_WORDS = r"(?P<words>[^\W\d_]+\.?(?:[\s/-]+[^\W\d_]+\.?)*|¢)"
_UNIT_ENDINGS = (
    re.compile(rf"\s*\\text\{{\s*(?P<words>[^{{}}]*?)\s*\}}{_POWER}$"),
    re.compile(rf"\s*(?<![\\a-zA-Z{{^_]){_WORDS}{_POWER}$"),
)
_PERCENT = re.compile(r"\s*(?:%|(?<!\\)percent|\\text\{\s*(?:percent|%)\s*\})$", re.IGNORECASE)
_DEGREES = re.compile(r"\s*\^\\circ\s*(?:[CF]|\\text\{[CF]\})?$")
_CURRENCY = re.compile(
    r"^(?P<sign>[-+]?)\s*(?:(?P<currency>[€£¥]|USD|US|(?:US\s*)?\\\$)"
    r"|\\text\{\\?(?P<wrapped>[€£¥$])\})\s*(?=[\d.])"
)
_SCALE = re.compile(
    rf"(?<=[\d}}])\s*(?P<opening>\\text\{{)?\s*(?<![a-zA-Z])(?P<word>{'|'.join(_SCALES)})"
    r"(?![a-zA-Z])\s*(?:\}(?P<closed>))?"
)
_OF_ANGLES = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DIGIT_RUN = re.compile(rf"\d{{{MAX_DIGITS},}}")


def read_quantity(text: str) -> Quantity | None:
    """None of all that is no plain number with at most a unit."""
    if len(text) > 2 * MAX_DIGITS or _DIGIT_RUN.search(text):
        return None
    scale = 1
    if match := _SCALE.search(text):  # 1.5 million dollars
        scale = _SCALES[match["word"]]
        opening = match["opening"] if match["opening"] and match["closed"] is None else ""
        text = f"{text[: match.start()]} {opening}{text[match.end() :]}".strip()
    currency = ""
    if match := _CURRENCY.match(text):
        sign = (match["wrapped"] or match["currency"])[-1].casefold()
        currency = _UNITS.get(sign, "dollar")
        text = match["sign"] + text[match.end() :]
    quantity = _read_with_unit(text)
    if quantity is None:
        return None
    unit = quantity.unit or currency
    value, last_place = quantity.value * scale, quantity.last_place * scale
    return quantity._replace(value=value, last_place=last_place, unit=unit)


def _read_with_unit(text: str) -> Quantity | None:
    if match := _PERCENT.search(text):
        number = _read_number(text[: match.start()])
        return number and number._replace(is_percent=True)
    number, unit = _read_number(text), ""
    if number is None:
        text, unit = split_unit(text)
        number = _read_number(text) if unit else None
    return number and number._replace(unit=unit)


def split_unit(text: str) -> tuple[str, str]:
    r"""(what stands before a unit, the unit); of `8\pi \text{ square inches}` (`8\pi`, `in^2`)."""
    match = _DEGREES.search(text)
    if match and not _OF_ANGLES.search(text):
        return text[: match.start()], "degree"
    for ending in _UNIT_ENDINGS:
        match = ending.search(text)
        if match and match.start() > 0 and (unit := _unit(match)):
            return text[: match.start()].strip(), unit
    return text, ""


def _unit(match: re.Match[str]) -> str:
    """In one form, or nothing where the words can be letters of a formula: 2k is no unit."""
    words = match["words"].casefold().replace(".", "").split()
    power = match["power"] or "".join(_POWERS.get(word, "") for word in words)
    words = [_UNITS.get(word, word) for word in words if word not in _POWERS]
    if len(words) > _MANY_WORDS or not _NO_UNITS.isdisjoint(words):
        return ""  # a sentence, or another number
    is_text = match[0].lstrip().startswith("\\")
    is_spaced = match[0].startswith(" ") and all(len(word) > 2 for word in words)
    if not words or not (is_text or is_spaced or _is_plain_unit(match["words"], words)):
        return ""
    return " ".join(words) + (f"^{power}" if power else "")


def _is_plain_unit(written: str, words: list[str]) -> bool:
    """Whether it is one without \\text, too. One letter is a variable; what is no Latin letter is
    none."""
    if not written.isascii():
        return True
    return len(written) > 1 and all(word in _UNITS.values() for word in words)


def units_agree(first: str, second: str) -> bool:
    """A unit that is left out, or that nobody here knows, contradicts none."""
    return first == second or not {first, second} <= _KNOWN


def same_quantity(gold: Quantity, answer: Quantity, tolerance: Fraction = Fraction(0)) -> bool:
    if not units_agree(gold.unit, answer.unit):
        return False
    # Where a percentage is asked for, 36 is as good as 36 %; else 0.36 is.
    scales = [Fraction(1)]
    if gold.is_percent != answer.is_percent:
        scales.append(Fraction(1, 100) if answer.is_percent else Fraction(100))
    return any(
        abs(answer.value * scale - gold.value) <= tolerance
        or rounds(answer, gold.value / scale)
        or rounds(gold, answer.value * scale)
        for scale in scales
    )


def rounds(decimal: Quantity, exact: Fraction) -> bool:
    """Whether a long decimal stands for a value that no decimal can write."""
    if decimal.significant is None or decimal.significant < CONVINCING_DIGITS:
        return False
    denominator = exact.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    if denominator == 1:
        return False
    is_cut = 0 <= abs(exact) - abs(decimal.value) < decimal.last_place
    distance = abs(decimal.value - exact)
    return 2 * distance <= decimal.last_place or (is_cut and distance < decimal.last_place)


def _read_number(text: str) -> Quantity | None:
    text = _without_parentheses(text.strip())
    for form in _FORMS:
        match = form.fullmatch(text)
        if match:
            return _quantity(match)
    return None


def _without_parentheses(text: str) -> str:
    while (
        len(text) > 1
        and (text[0] + text[-1] == "{}" or (text[0] + text[-1] == "()" and "," not in text))
        and not set(text[1:-1]) & set("(){}")
    ):  # (12,102) is a point
        text = text[1:-1].strip()
    return text


def _quantity(match: re.Match[str]) -> Quantity | None:
    groups = match.groupdict()
    sign = -1 if groups["sign"] == "-" else 1
    if groups.get("top"):
        bottom = _decimal(groups["bottom"])
        top, whole = _decimal(groups["top"]), groups.get("whole")
        if bottom == 0 or (whole and top >= bottom):  # 2 times 3/2 is no mixed number
            return None
        return Quantity(sign * (int(whole or 0) + top / bottom))
    exponent = int(groups.get("exponent") or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    digits = groups["decimal"] or "1"
    value = _decimal(digits)
    decimals = len(digits.partition(".")[2])
    if repeating := groups.get("repeating"):
        value += Fraction(int(repeating), (10 ** len(repeating) - 1) * 10**decimals)
        return Quantity(sign * value)
    scale = Fraction(10) ** exponent
    if "." not in digits:
        return Quantity(sign * value * scale)
    significant = len(re.sub(r"[.,]", "", digits).lstrip("0"))
    place = Fraction(1, 10**decimals) * scale
    return Quantity(sign * value * scale, significant=significant, last_place=place)


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", "").rstrip(".") or "0")
