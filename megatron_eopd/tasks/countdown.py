"""Countdown with steps: a toy task in which most problems have several valid answers.

In: nothing. Out: every problem with every valid answer, a split, an exact verifier and a tokenizer.
Four numbers 1-9 must be combined with + - * into a target 1-50, each number used once:

    prompt     "3 5 7 8 -> 24 :"                         7 tokens, no beginning-of-sequence token
    response   "8 * 7 = 56 ; 5 - 3 = 2 ; 56 - 2 = 54"    17 tokens and the end-of-sequence token

Each step `a op b = c` takes two numbers out of the pool and puts their result in. A good model is
unsure which step to take and sure what it gives, so its entropy is high at choices and low at
results. Like Qwen3, prompts carry no beginning-of-sequence token; one exists for tools that ask.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Literal

from megatron_eopd.tasks.task import Grade, Verdict
from megatron_eopd.tasks.task import Problem as TaskProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMBERS_PER_PROBLEM = 4
SMALLEST_NUMBER, LARGEST_NUMBER = 1, 9
SMALLEST_TARGET, LARGEST_TARGET = 1, 50
LARGEST_RESULT = 99
"""Results of steps lie in 0-99, because every number is one token."""

NUM_TEST_MULTISETS = 50
SPLIT_SEED = 1

PROMPT_LENGTH = 7
RESPONSE_LENGTH = 18
"""Three steps of `a op b = c ;`, in which the last `;` is the end-of-sequence token."""

VOCAB_SIZE = 112
PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<bos>", "<eos>", "<unk>"

# No leading zeros and ASCII digits only: text outside the vocabulary is never an answer.
_NUMBER = r"(0|[1-9][0-9]?)"
_STEP = re.compile(rf"{_NUMBER} ([+*-]) {_NUMBER} = {_NUMBER}")
_STEP_SEPARATOR = " ; "
_ANSWER = re.compile(rf"({_NUMBER}(?: {_NUMBER})*) -> {_NUMBER}")


@dataclass(frozen=True)
class Problem:
    """Numbers in ascending order and the target to be made from them."""

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        # Sorted, so that equal problems compare equal and meet the same key in all_problems().
        if list(self.numbers) != sorted(self.numbers):
            raise ValueError(f"numbers={self.numbers} must ascend. Pass tuple(sorted(numbers)).")
        if len(self.numbers) != NUMBERS_PER_PROBLEM or not all(
            SMALLEST_NUMBER <= number <= LARGEST_NUMBER for number in self.numbers
        ):
            raise ValueError(
                f"numbers={self.numbers} is no Countdown problem. "
                f"Give {NUMBERS_PER_PROBLEM} numbers, each {SMALLEST_NUMBER}-{LARGEST_NUMBER}."
            )
        if not SMALLEST_TARGET <= self.target <= LARGEST_TARGET:
            raise ValueError(
                f"target={self.target} is out of range. "
                f"Give one in {SMALLEST_TARGET}-{LARGEST_TARGET}."
            )

    def prompt_text(self) -> str:
        return f"{self.answer_text()} :"

    def answer_text(self) -> str:
        """The problem as the "answer" of a prompt record: a verifier needs it, and no key."""
        return f"{' '.join(map(str, self.numbers))} -> {self.target}"

    @classmethod
    def from_answer(cls, text: str) -> "Problem":
        match = _ANSWER.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is no Countdown problem. Write it as Problem.answer_text() does, "
                'for example "3 5 7 8 -> 24".'
            )
        numbers, target = text.split(" -> ")
        return cls(tuple(int(number) for number in numbers.split(" ")), int(target))


# --- enumeration --------------------------------------------------------------------------------


@cache
def all_problems() -> dict[Problem, tuple[str, ...]]:
    """Every solvable problem with all its valid traces, in a fixed order (about 0.3 s, cached)."""
    return {
        Problem(numbers, target): traces
        for numbers in _all_multisets()
        for target, traces in sorted(_traces_by_result(numbers).items())
        if SMALLEST_TARGET <= target <= LARGEST_TARGET
    }


def num_valid_traces(problem: Problem) -> int:
    """Number of distinct correct traces; 0 when the problem has no solution."""
    return len(all_problems().get(problem, ()))


def split(name: Literal["train", "test"]) -> list[Problem]:
    """Problems of one split, shuffled once and for all, so that any prefix is a fair sample.

    Whole multisets are held out: no test problem shares its numbers with a training problem.
    """
    if name not in ("train", "test"):
        raise ValueError(f'split {name!r} does not exist. Ask for "train" or "test".')
    rng = random.Random(SPLIT_SEED)
    multisets = list(_all_multisets())
    rng.shuffle(multisets)
    test_multisets = set(multisets[:NUM_TEST_MULTISETS])
    problems = [
        problem
        for problem in all_problems()
        if (problem.numbers in test_multisets) == (name == "test")
    ]
    rng.shuffle(problems)
    return problems


def _all_multisets() -> Iterator[tuple[int, ...]]:
    return combinations_with_replacement(
        range(SMALLEST_NUMBER, LARGEST_NUMBER + 1), NUMBERS_PER_PROBLEM
    )


@cache
def _traces_by_result(pool: tuple[int, ...]) -> dict[int, tuple[str, ...]]:
    """For an ascending pool: each number it can be reduced to, and all traces that do so."""
    if len(pool) == 1:
        return {pool[0]: ("",)}
    traces_by_result: dict[int, list[str]] = {}
    # A set of value pairs, not of positions: equal numbers in the pool give one trace, not two.
    pairs = {(pool[j], pool[i]) for j in range(len(pool)) for i in range(j)}
    for larger, smaller in sorted(pairs):
        for op in "+-*":
            result = _apply(op, larger, smaller)
            if result > LARGEST_RESULT:
                continue
            step = f"{larger} {op} {smaller} = {result}"
            for final, tails in _traces_by_result(_reduce(pool, larger, smaller, result)).items():
                traces_by_result.setdefault(final, []).extend(
                    step + _STEP_SEPARATOR + tail if tail else step for tail in tails
                )
    return {final: tuple(traces) for final, traces in traces_by_result.items()}


def _reduce(pool: tuple[int, ...], a: int, b: int, result: int) -> tuple[int, ...]:
    """The pool after a step: a and b (one copy of each) go, their result comes."""
    remaining = list(pool)
    remaining.remove(a)
    remaining.remove(b)
    return tuple(sorted([*remaining, result]))


def _apply(op: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[op]


# --- checking a response ------------------------------------------------------------------------


def verify(problem: Problem, response_text: str) -> bool:
    """Whether a decoded response (without special tokens) solves the problem.

    Exact integer arithmetic over the pool; model text is never evaluated. Both orders of the
    operands of + and * are accepted: `verify(p, r)` holds iff `canonical(r)` is a trace of p.
    """
    steps = _parse(response_text)
    if steps is None:
        return False
    pool = problem.numbers
    for a, op, b, result in steps:
        try:
            pool = _reduce(pool, a, b, result)
        except ValueError:  # a or b is not in the pool, or both are its only copy of one number
            return False
        if _apply(op, a, b) != result:
            return False
    return pool == (problem.target,)


def canonical(response_text: str) -> str:
    """The spelling all_problems() uses: larger operand first for + and *.

    Text outside the grammar comes back unchanged, so that whole batches can be mapped.
    """
    steps = _parse(response_text)
    if steps is None:
        return response_text
    return _STEP_SEPARATOR.join(
        f"{a} {op} {b} = {result}" if op == "-" else f"{max(a, b)} {op} {min(a, b)} = {result}"
        for a, op, b, result in steps
    )


def _parse(response_text: str) -> list[tuple[int, str, int, int]] | None:
    """Steps as (a, op, b, result), or None if the text is not exactly three steps."""
    matches = [_STEP.fullmatch(step) for step in response_text.split(_STEP_SEPARATOR)]
    if len(matches) != NUMBERS_PER_PROBLEM - 1:
        return None
    steps = []
    for match in matches:
        if match is None:
            return None
        a, op, b, result = match.groups()
        steps.append((int(a), op, int(b), int(result)))
    return steps


# --- as a task ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Countdown:
    """Its problems, for training and for evaluation, and its verifier."""

    name: str = "countdown"

    def problems(self) -> Iterator[TaskProblem]:
        return _as_task("test")

    def training_problems(self) -> Iterator[TaskProblem]:
        return _as_task("train")

    def grade(self, answer: str, response: str) -> Grade:
        if _parse(response) is None:
            return Grade(Verdict.NO_ANSWER)
        is_right = verify(Problem.from_answer(answer), response)
        return Grade(Verdict.RIGHT if is_right else Verdict.WRONG, canonical(response))

    def right_response(self, answer: str) -> str | None:
        return next(iter(all_problems().get(Problem.from_answer(answer), ())), None)

    def num_right(self, answer: str) -> int | None:
        return num_valid_traces(Problem.from_answer(answer))

    def graders(self) -> dict[str, str]:
        return {"countdown": "1"}


def _as_task(name: Literal["train", "test"]) -> Iterator[TaskProblem]:
    for number, problem in enumerate(split(name)):
        where, answer = f"countdown problem {number}", problem.answer_text()
        # Any of its solutions, and always the same one.
        solution = random.Random(answer).choice(all_problems()[problem])
        columns = {"solution": solution}
        yield TaskProblem(where, problem.prompt_text(), answer, columns=columns)


# --- tokenizer ----------------------------------------------------------------------------------


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per word, split at whitespace; the number n has id n, which reads well in dumps.

    Nothing is added on encoding. The last entries are reserved, so that the vocabulary divides by
    every tensor-parallel size up to 8.
    """
    # Here: a process that grades needs none, and they take seconds to import.
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN]
    words = [*map(str, range(LARGEST_RESULT + 1)), "+", "-", "*", "=", ";", "->", ":", *special]
    words += [f"<reserved_{i}>" for i in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(
        WordLevel({word: token_id for token_id, word in enumerate(words)}, unk_token=UNK_TOKEN)
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        padding_side="left",
        # Clean-up would join punctuation to the word before it, and the grammar wants the spaces.
        clean_up_tokenization_spaces=False,
    )
