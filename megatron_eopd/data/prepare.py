"""Data sets into prompt files. In: rows of files or hub data sets. Out: one jsonl file,
`{"prompt": …, "answer": …}` a line, and a count of what was left out and why.

Rows stream through in their order; in memory stay a digest and the answer of each distinct prompt.
Every row is counted once, under the first reason of `Fate` that holds for it.
"""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megatron_eopd.data.boxed import last_box
from megatron_eopd.data.chats import (
    Chat,
    NotText,
    NoUserTurn,
    check_system_column,
    is_unicode,
    read_chat,
)
from megatron_eopd.data.columns import ABSENT, is_missing, look_up
from megatron_eopd.data.sources import (
    BATCH_ROWS,
    RowFile,
    Rows,
    is_saved_data_set,
    with_progress,
)
from megatron_eopd.errors import ConfigError

COLUMN_CHECK_ROWS = 1000
"""A column counts as missing when none of a source's first rows has it. Rows of a jsonl file may
differ, and a mistyped name should not cost a pass over millions of them."""

CUT = "- of these cut behind the question"
"""Chats that went on behind their last user turn."""


class Fate(StrEnum):
    NO_QUESTION = "chat without a user turn"
    NOT_TEXT = "chat with images, sound or tools"
    SEVERAL_TURNS = "chat with several user turns"
    NO_PROMPT = "empty prompt"
    NO_ANSWER = "no answer"
    NOT_UNICODE = "not valid Unicode"
    DUPLICATE = "duplicate, same answer"
    OTHER_ANSWER = "duplicate, other answer"
    HELD_OUT = "begins like an evaluation prompt"
    TOO_LONG = "too long"
    KEPT = "kept"


# --- what the columns of a data set mean --------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Where prompt and answer stand. Names may be dotted: reward_model.ground_truth."""

    prompt: str
    """Text, or a chat in any of the forms of data.chats."""
    answers: tuple[tuple[str, Callable[[str], str]], ...]
    """(column, what gets the answer out of it): the first that gives any wins. Empty: prompts
    only."""
    clean: Callable[[str], str] = str
    """Takes a data set's own instructions off the prompt."""
    keep: tuple[tuple[str, str], ...] = ()
    """(name in the output, column) of what is copied as it is."""
    single_turn: bool = False
    """Take no chats that have more than one turn of the user, and of the others that turn."""
    drop_system_turns: bool = False

    def read(self, where: str, row: dict[str, Any]) -> "Example":
        answer = ""
        for name, extract in self.answers:
            answer = answer or extract(_answer_text(f"{where}, column {name}", look_up(row, name)))
        kept = {name: look_up(row, column) for name, column in self.keep}
        return Example(
            where,
            self._chat(f"{where}, column {self.prompt}", row),
            answer=answer.strip() if self.answers else None,
            kept={name: value for name, value in kept.items() if value is not ABSENT},
        )

    def _chat(self, where: str, row: dict[str, Any]) -> "Chat | Fate":
        value = look_up(row, self.prompt)
        if is_missing(value):
            return Fate.NO_PROMPT
        try:
            chat = read_chat(where, value)
        except NoUserTurn:
            return Fate.NO_QUESTION
        except NotText:
            return Fate.NOT_TEXT
        if not self.drop_system_turns:
            check_system_column(where, row, value, chat)
        context = [t for t in chat.context if not (self.drop_system_turns and t.role == "system")]
        if self.single_turn:
            if any(turn.role == "user" for turn in context):
                return Fate.SEVERAL_TURNS
            context = [turn for turn in context if turn.role == "system"]
        chat = Chat(self.clean(chat.text).strip(), tuple(context), chat.is_cut)
        return Fate.NO_PROMPT if chat.empty_turn else chat


@dataclass(frozen=True)
class Example:
    where: str
    """What it stands in, for messages."""
    chat: Chat | Fate
    """Or why there is none."""
    answer: str | None
    """Empty where there is none; None where none is wanted."""
    kept: dict[str, Any]

    def line(self) -> str:
        """Of the prompt file. A lone question is text there, as it is without a template."""
        turns = [turn._asdict() for turn in self.chat.turns]
        prompt = turns if len(turns) > 1 else self.chat.text
        answer = {} if self.answer is None else {"answer": self.answer}
        # default=str: parquet has dates and decimals, which JSON has not.
        return json.dumps(self.kept | {"prompt": prompt} | answer, ensure_ascii=False, default=str)


def _answer_text(where: str, value: Any) -> str:
    if is_missing(value):
        return ""
    if not isinstance(value, str | int | float):
        raise ConfigError(
            f"{where}: neither text nor a number, but {str(value)[:80]}. Name what is inside it "
            f"with --answer-column, for example answer.0 or answer.value."
        )
    return str(value)


# --- presets ------------------------------------------------------------------------------------


def answer_after_hashes(solution: str) -> str:
    """GSM8K's gold answer, behind the last ####, without the commas of 1,000; empty where
    there is no ####."""
    return solution.rpartition("####")[2].replace(",", "") if "####" in solution else ""


def boxed_answer(solution: str) -> str:
    return last_box(solution) or ""


DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def without_dapo_instructions(prompt: str) -> str:
    return prompt.strip().removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER)


PRESETS = {
    "prompts": Columns("prompt", (("answer", str),)),
    "gsm8k": Columns("question", (("answer", answer_after_hashes),)),
    "math": Columns("problem", (("answer", str), ("solution", boxed_answer))),
    "dapo_math": Columns(
        "prompt", (("reward_model.ground_truth", str),), clean=without_dapo_instructions
    ),
}
"""`prompts` is the form that this module writes."""


# --- rows of a source ---------------------------------------------------------------------------


class Source:
    """A file, or a data set of the hub or a directory, NAME[:CONFIG[:SPLIT]].

    Raises:
        ConfigError: it cannot be read, or has no such columns.
    """

    def __init__(self, name: str, columns: Columns) -> None:
        self.file = RowFile(Path(name)) if is_file(name) else None
        rows = data_set_rows(name) if self.file is None else iter(self.file)
        self.rows = _with_columns(name, rows, columns)


def is_file(name: str) -> bool:
    path = Path(name)
    if path.is_file():
        return True
    if _FILE_NAME.search(name) or not name:
        raise ConfigError(f"{name or 'empty name'}: no such file, and no name of a data set.")
    return False


_FILE_NAME = re.compile(r"\.(jsonl?|ndjson|parquet|csv|tsv|txt)(\.\w+)?$", re.IGNORECASE)


def data_set_rows(source: str) -> Rows:
    # Here, not above: it takes a second, and files do without.
    import datasets

    name, config, split = ([*source.split(":"), "", ""])[:3]
    saved = is_saved_data_set(Path(name))
    with _reading(source):
        # load_dataset refuses what save_to_disk wrote of one split, and takes several for one.
        data_set = (
            datasets.load_from_disk(name)
            if saved
            else datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        )
    if saved:
        data_set = _split_of(data_set, source, name, config, split)
    with _reading(source):
        # In Arrow batches: one row after the other takes ten times as long.
        batches = data_set.with_format("arrow").iter(BATCH_ROWS)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{source} row {number}", row


@contextmanager
def _reading(source: str) -> Iterator[None]:
    import datasets

    try:
        yield
    # ArrowInvalid and a split that does not exist are ValueErrors, no network is an OSError.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{source}: cannot be read ({error}).") from None


def _split_of(data_set: Any, source: str, name: str, config: str, split: str) -> Any:
    """Of a data set that was saved, with its splits or as one of them."""
    if not isinstance(data_set, dict):
        if config or split:
            raise ConfigError(f"{source}: one data set without configs or splits. Give {name}.")
        return data_set
    if config or (split or "train") not in data_set:
        raise ConfigError(
            f"{source}: name one of its splits, as {name}::SPLIT. There are {', '.join(data_set)}."
        )
    return data_set[split or "train"]


def _with_columns(source: str, rows: Rows, columns: Columns) -> Rows:
    head = list(islice(rows, COLUMN_CHECK_ROWS))
    if not head:
        raise ConfigError(f"{source}: no rows in it.")
    answers = tuple(name for name, _ in columns.answers)  # one of them is enough
    for names in [(columns.prompt,), answers, *((column,) for _, column in columns.keep)]:
        if names and all(look_up(row, name) is ABSENT for _, row in head for name in names):
            present = sorted({name for _, row in head for name in _names(row)})
            raise ConfigError(
                f"{source}: no column {' or '.join(names)}. There are {', '.join(present)}. Name "
                f"them with --prompt-column, --answer-column or --preset, or as --exclude "
                f"COLUMN={source}."
            )
    return chain(head, rows)


def _names(row: dict[str, Any]) -> Iterator[str]:
    """Dotted names of all columns."""
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in _names(value))
        else:
            yield name


# --- which rows are kept ------------------------------------------------------------------------


def duplicate_key(chat: Chat) -> bytes:
    """Equal for prompts that differ in white space or in the composition of accents only. Case and
    punctuation count: in mathematics they make another problem."""
    turns = [f"{turn.role} {turn.content}" for turn in chat.context] + [chat.text]
    text = "\0".join(" ".join(unicodedata.normalize("NFC", turn).split()) for turn in turns)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def overlap_key(prompt: str, length: int) -> str:
    """Equal for prompts whose first `length` letters and digits are the same but for case.

    A prompt that has fewer is compared as a whole and with its punctuation, because 2 + 3 and 2 − 3
    differ in nothing else.
    """
    text = unicodedata.normalize("NFKC", prompt).casefold()
    letters = "".join(re.findall(r"[^\W_]+", text))
    return letters[:length] if len(letters) >= length else "".join(text.split())


def overlap_keys(chat: Chat, length: int) -> set[str]:
    """Of every turn of the user."""
    return {overlap_key(turn.content, length) for turn in chat.turns if turn.role == "user"}


def held_out_keys(source: str, columns: Columns, length: int) -> set[str]:
    """Of every prompt of an evaluation set."""
    columns = replace(columns, answers=(), keep=(), single_turn=False)
    keys: set[str] = set()
    for where, row in Source(source, columns).rows:
        chat = columns.read(where, row).chat
        keys |= overlap_keys(chat, length) if isinstance(chat, Chat) else set()
    if not keys:
        raise ConfigError(f"{source}: no prompts in column {columns.prompt}, nothing to exclude.")
    return keys


@dataclass
class Selection:
    """Decides over one row after the other."""

    held_out: set[str] = field(default_factory=set)
    """Overlap keys of the evaluation sets, made with `prefix_length`."""
    prefix_length: int = 100
    count_tokens: Callable[[Example], int] | None = None
    """None: any length is right."""
    max_prompt_length: int = 0
    """In tokens."""
    num_cut: int = field(default=0, init=False)
    """Chats that were kept, without what came behind their last user turn."""
    _answer_of: dict[bytes, str | None] = field(default_factory=dict, init=False)

    def fate(self, example: Example) -> Fate:
        chat, answer = example.chat, example.answer
        if isinstance(chat, Fate):
            return chat
        if answer == "":
            return Fate.NO_ANSWER
        if not is_unicode(example.line()):
            return Fate.NOT_UNICODE
        key = duplicate_key(chat)
        if key in self._answer_of:
            return Fate.DUPLICATE if self._answer_of[key] == answer else Fate.OTHER_ANSWER
        self._answer_of[key] = answer
        if self.held_out and overlap_keys(chat, self.prefix_length) & self.held_out:
            return Fate.HELD_OUT
        if self.count_tokens and self.count_tokens(example) > self.max_prompt_length:
            return Fate.TOO_LONG
        self.num_cut += chat.is_cut
        return Fate.KEPT


# --- the whole of it ----------------------------------------------------------------------------


def prepare(
    sources: Sequence[str], output: Path, columns: Columns, selection: Selection
) -> Counter[Fate]:
    """Write `output`, whole or not at all.

    Raises:
        ConfigError: a source cannot be read, or none of its rows is kept.
    """
    opened = [Source(source, columns) for source in sources]  # all, before any is read through
    counts: Counter[Fate] = Counter()
    rows: Rows = chain.from_iterable(source.rows for source in opened)
    files = [source.file for source in opened if source.file is not None]
    rows = (
        with_progress(rows, files)
        if len(files) == len(opened)
        else tqdm(rows, unit=" rows", disable=None)
    )
    with appears_whole(output) as file:
        for example in (columns.read(where, row) for where, row in rows):
            fate = selection.fate(example)
            counts[fate] += 1
            if fate is Fate.KEPT:
                file.write(example.line() + "\n")
        if not counts[Fate.KEPT]:
            raise ConfigError(f"nothing is left to write:\n{counts_table(counts)}")
    return counts


@contextmanager
def appears_whole(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name, and replaces what had it, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def counts_table(counts: Counter[Fate], num_cut: int = 0) -> str:
    rows: Iterable[tuple[str, int]] = [
        ("rows read", counts.total()),
        *((f"- {fate}", counts[fate]) for fate in Fate if fate is not Fate.KEPT),
        ("kept", counts[Fate.KEPT]),
        (CUT, num_cut),
    ]
    return "\n".join(f"{name:<36} {count:>12,}" for name, count in rows)
