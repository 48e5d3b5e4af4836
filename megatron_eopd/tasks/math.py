r"""Mathematics with final answers: math500, gsm8k and their like. In: a file of problems, or a data
set of the hub. Out: problems, and verdicts on what a model writes to them.

Light to import, and to pickle: sympy comes with the first expression that needs it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from typing import ClassVar, Literal

from megatron_eopd.data.boxed import has_box, last_box
from megatron_eopd.tasks.math_answer import canonical, is_readable, same_answer
from megatron_eopd.tasks.math_number import MAX_DIGITS
from megatron_eopd.tasks.math_second import same_last_number, same_spelling
from megatron_eopd.tasks.math_text import MAX_LENGTH, tidy
from megatron_eopd.tasks.task import Grade, Problem, Verdict

BOXED_SUFFIX = r"Please reason step by step, and put your final answer within \boxed{}."

GRADER = "1"
"""Changes with any verdict of this project's own part."""

SHOWN_LENGTH = 200
"""Of a canonical spelling."""


def without_solution(answer: str) -> str:
    """GSM8K's gold answer, behind the last ####, without the commas of 1,000; all of the text where
    there is no ####."""
    return answer.rpartition("####")[2].strip().replace(",", "")


@dataclass(frozen=True)
class Preset:
    """What a data set's columns mean, and how its problems are asked."""

    prompts: tuple[str, ...]
    """The first of these columns that a row has."""
    answers: tuple[str, ...]
    form: Literal["boxed", "number"] = "boxed"
    """The last box; or the last box or else the last number, of a plain number."""
    suffix: str = BOXED_SUFFIX
    hub: str | None = None
    """NAME[:CONFIG[:SPLIT]] of the data set, where no file is named."""
    clean: Callable[[str], str] = str.strip
    """Gets the answer out of its column."""


_PROMPTS = ("problem", "question", "Problem", "Question", "prompt")
_ANSWERS = ("answer", "final_answer", "Answer", "expected_answer")
_ANY = ("prompt", "messages", "conversations", "problem", "question")

PRESETS = {
    "math": Preset(_ANY, _ANSWERS, suffix=""),
    "number": Preset(_ANY, _ANSWERS, "number", suffix="", clean=without_solution),
    "gsm8k": Preset(
        _PROMPTS, ("answer",), "number", hub="openai/gsm8k:main:test", clean=without_solution
    ),
    "math500": Preset(_PROMPTS, _ANSWERS, hub="HuggingFaceH4/MATH-500::test"),
    "amc23": Preset(_PROMPTS, _ANSWERS, hub="math-ai/amc23::test"),
    "minerva": Preset(_PROMPTS, _ANSWERS, hub="math-ai/minervamath::test"),
    "olympiadbench": Preset(
        _PROMPTS, ("final_answer", "answer"), hub="math-ai/olympiadbench::test"
    ),
    "aime24": Preset(_PROMPTS, _ANSWERS, hub="HuggingFaceH4/aime_2024::train"),
    "aime25": Preset(_PROMPTS, _ANSWERS, hub="math-ai/aime25::test"),
    "champ": Preset(_PROMPTS, _ANSWERS),
}
"""`math` and `number` are for files of your own, which say in their prompts what they want."""


@dataclass(frozen=True)
class MathTask:
    name: str
    source: str | None = None
    """A file, or a data set of the hub, NAME[:CONFIG[:SPLIT]]; None: the preset's."""
    preset: str = "math"
    suffix: str | None = None
    """Stands behind each problem, on a line of its own; None: the preset's."""
    preload: ClassVar = ("megatron_eopd.tasks.math_symbolic",)
    """What processes that grade import before they are asked to."""

    def problems(self) -> Iterator[Problem]:
        # Here, not above: whoever grades reads no files, and starts faster for it.
        from megatron_eopd.tasks.math_problems import read_problems

        preset = PRESETS[self.preset]
        suffix = preset.suffix if self.suffix is None else self.suffix
        return read_problems(self.source or preset.hub, preset, suffix, self.preset)

    def grade(self, answer: str, response: str) -> Grade:
        if PRESETS[self.preset].form == "number":
            return grade_number(answer, response)
        return grade_boxed(answer, response)

    def right_response(self, answer: str) -> str:
        if PRESETS[self.preset].form == "number":
            return f"The answer is {answer}."
        return rf"The answer is $\boxed{{{_without_tolerance(answer)[0]}}}$."

    def is_gradable(self, answer: str) -> bool:
        return PRESETS[self.preset].form == "number" or is_gradable(answer)

    def num_right(self, answer: str) -> None:
        return None

    def graders(self) -> dict[str, str]:
        libraries = ("math-verify", "latex2sympy2_extended", "sympy")
        return {"megatron_eopd": GRADER} | {name: version(name) for name in libraries}


# --- boxed answers ------------------------------------------------------------------------------


def grade_boxed(gold: str, response: str) -> Grade:
    """By the last box. A gold answer may name others that are as right: `5/14, or approximately
    35.7%`."""
    answer = last_box(response)
    if answer is None:
        return Grade(Verdict.NO_ANSWER)
    gold, tolerance = _without_tolerance(gold)
    golds = alternatives(gold)
    second = any(same_spelling(each, answer) for each in golds)
    if len(answer) > MAX_LENGTH:
        verdict = Verdict.RIGHT if answer in golds else Verdict.UNPARSABLE
        return Grade(verdict, answer[:SHOWN_LENGTH], second)
    tidied = tidy(answer)
    if not tidied:
        return Grade(Verdict.NO_ANSWER, "", second)
    verdict = _verdict([_same(tidy(each), tidied, tolerance) for each in golds])
    spelled = gold if verdict is Verdict.RIGHT else canonical(tidied)
    return Grade(verdict, spelled[:SHOWN_LENGTH], second)


def is_gradable(gold: str) -> bool:
    """Whether more than its own spelling could be found to be right."""
    golds = alternatives(_without_tolerance(gold)[0])
    return any(len(each) <= MAX_LENGTH and is_readable(tidy(each)) for each in golds)


def _same(gold: str, answer: str, tolerance: Fraction) -> bool | None:
    try:
        return same_answer(gold, answer, tolerance)
    except RecursionError:
        return None


def _verdict(marks: list[bool | None]) -> Verdict:
    if True in marks:
        return Verdict.RIGHT
    return Verdict.UNPARSABLE if None in marks else Verdict.WRONG


_OTHERWISE = re.compile(r",?\s+or (?:equivalently|approximately)\s+|\s*\(i\.e\..*\)\s*$")
_ONLY = re.compile(r"\s+is the only possible value$")
_YES_OR_NO = re.compile(r"(yes|no)\b[,.;]", re.IGNORECASE)


def alternatives(gold: str) -> list[str]:
    """The answers that a gold answer names, itself the first."""
    plain = _ONLY.sub("", gold)
    others = [part.strip() for part in _OTHERWISE.split(plain) if part.strip()]
    short = _YES_OR_NO.match(gold)
    return list(dict.fromkeys([gold, plain, *others, *([short[1]] if short else [])]))


_TOLERANCE = re.compile(r"\s*\[within ([\d.]+(?:[eE][-+]?\d+)?)\]$")


def with_tolerance(answer: str, tolerance: str) -> str:
    """How the answer of a problem says how far from it another one may be."""
    return f"{answer} [within {tolerance}]"


def _without_tolerance(answer: str) -> tuple[str, Fraction]:
    match = _TOLERANCE.search(answer)
    return (answer[: match.start()], Fraction(match[1])) if match else (answer, Fraction(0))


# --- plain numbers ------------------------------------------------------------------------------

# 1,234.5 or 1234.5 or .5; a minus sign counts where no number stands before it (3-2 ends in 2).
_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+")


def grade_number(gold: str, response: str) -> Grade:
    """By the last box, or else the last number of the text. Enough for GSM8K and its like, whose
    answers are plain numbers; not for fractions, expressions or words."""
    if has_box(response):
        grade = grade_boxed((_numbers(gold) or [gold])[0], response)
        answer = last_box(response)
        second = None if answer is None else same_last_number(gold, answer)
        spelled = gold if grade.verdict is Verdict.RIGHT else grade.canonical
        return Grade(grade.verdict, spelled, second)
    answer = last_number(response)
    if answer is None:
        return Grade(Verdict.NO_ANSWER)
    second = same_last_number(gold, response)
    found = _exact(answer)
    if found is None:
        return Grade(Verdict.UNPARSABLE, answer[:SHOWN_LENGTH], second)
    if found == plain_number(gold) and not _is_part(response):
        return Grade(Verdict.RIGHT, gold, second)
    return Grade(Verdict.WRONG, str(found)[:SHOWN_LENGTH], second)


# Before the last number of a text: 1/18, 2^18, 2^{18}, \\frac{1}{18}, 17-18, 1e18.
_PART = re.compile(r"(?:\d\)?/|\^\{?|\}\{|\d-|\d[eE][-+]?)\Z")


def _is_part(text: str) -> bool:
    """Whether the last number of a text is one of an expression, without an equals sign."""
    text = text.replace("\N{MINUS SIGN}", "-")
    *_, last = _NUMBER.finditer(text)
    return _PART.search(text, max(0, last.start() - 4), last.start()) is not None


def _exact(number: str | None) -> Fraction | None:
    """None where it is too long to be an answer."""
    return None if number is None or len(number) > MAX_DIGITS else Fraction(number)


def last_number(text: str) -> str | None:
    """Of 18, 18.0 and 1,8 it is 18, 18.0 and 8. Exponents are not read: 1e5 ends in 5."""
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def plain_number(answer: str) -> Fraction | None:
    """The one number of an answer; None where there is none or several, or an expression, whose
    last number would mean something else."""
    numbers = _numbers(answer)
    return _exact(numbers[0]) if len(numbers) == 1 and not set(answer) & set("/\\^") else None


def _numbers(text: str) -> list[str]:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return [number.replace(",", "") for number in found]
