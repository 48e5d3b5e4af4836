"""Rows of a prompt file. In: a path and the options of `[data]`. Out: questions, in text, and all
that stands beside them; or an error that names file and line.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from megatron_eopd.config import BUILT_IN_TASKS, DataConfig
from megatron_eopd.data.chats import (
    Chat,
    check_system_column,
    is_blank,
    is_message,
    is_unicode,
    read_chat,
)
from megatron_eopd.data.sources import RowFile, with_progress
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import ALL_TEACHERS, DEFAULT_TEACHER, Turn

PROMPT_KEYS = ("prompt", "messages", "conversations")
"""Where `data.prompt_key` does not say which, the first of these that has a value in the first
line."""

_LEAVE_OUT = "Take the line out; tools/prepare_data.py does."


class Row(NamedTuple):
    """A prompt before it is tokenized."""

    where: str
    """What it stands in, for messages."""
    text: str
    answer: str = ""
    teacher: str = DEFAULT_TEACHER
    responses: tuple[str, ...] = ()
    """Reference answers."""
    context: tuple[Turn, ...] = ()
    """The turns of a chat before `text`."""
    is_cut: bool = False
    """Whether turns behind `text` were left off."""
    columns: Mapping[str, Any] = MappingProxyType({})
    """All that the line holds, for what a teacher reads."""

    @classmethod
    def of_chat(cls, where: str, chat: Chat) -> "Row":
        context = tuple(Turn(*message) for message in chat.context)
        return cls(where, chat.text, context=context, is_cut=chat.is_cut)


def prompt_rows(path: Path, data: DataConfig, teachers: Sequence[str]) -> Iterator[Row]:
    """Rows of the prompt file `data.prompts`. `teachers`: as load_prompts has them."""
    if not path.exists():
        tasks = ", ".join(BUILT_IN_TASKS)
        raise ConfigError(
            f"data.prompts={path}: no such file, and no built-in task of that name ({tasks})."
        )
    file = RowFile(path)
    key = data.prompt_key
    for where, row in with_progress(file, [file]):
        key = key or find_key(row)
        yield Row.of_chat(where, read_prompt(where, row, key))._replace(
            answer=_answer(where, row.get("answer")),
            teacher=_teacher(where, row, data.teacher_key, teachers),
            responses=_responses(row.get(data.response_key)) if data.response_key else (),
            columns=row,
        )


def find_key(row: dict[str, Any]) -> str | None:
    """Of the prompt, where no option names it."""
    present = [name for name in PROMPT_KEYS if name in row]
    return next((name for name in present if row[name]), next(iter(present), None))


def read_prompt(where: str, row: dict[str, Any], key: str | None) -> Chat:
    """
    Raises:
        ConfigError: there is nothing to ask a model.
    """
    if key not in row and is_message(row):
        raise ConfigError(
            f"{where}: a message, and not an object that holds messages. Is a line of the file a "
            f'list of them? Write {{"messages": [...]}}.'
        )
    if key not in row:
        raise ConfigError(
            f"{where}: expected a key {key or ' or '.join(PROMPT_KEYS)}, and there are "
            f"{', '.join(row) or 'none'}. Set data.prompt_key to the one that holds the prompt, or "
            f"make a prompt file with tools/prepare_data.py."
        )
    if row[key] is None:
        raise ConfigError(f"{where}: {key} is null. {_LEAVE_OUT}")
    chat = read_chat(f"{where}, key {key}", row[key])
    if chat.empty_turn:
        raise ConfigError(
            f"{where}: {chat.empty_turn} is empty, or white space and invisible characters alone. "
            f"{_LEAVE_OUT}"
        )
    check_system_column(where, row, row[key], chat)
    for turn in chat.turns:
        _check_unicode(where, key, turn.content)
    return chat


def _answer(where: str, value: Any) -> str:
    """Empty where there is none; parquet has NaN where a number is missing."""
    text = "" if value is None or value != value else str(value)
    _check_unicode(where, "answer", text)
    return text


def _teacher(where: str, row: dict[str, Any], key: str, teachers: Sequence[str]) -> str:
    teacher = row.get(key)
    if teacher is None:  # parquet has a column in every row or in none
        return teachers[0]
    if teacher == ALL_TEACHERS and teacher not in teachers:
        raise ConfigError(
            f"{where}: {key}={teacher!r} asks for every teacher, and objective.teacher_mixture="
            f"none. Set it to divergences or distributions, with several teachers, or name one."
        )
    if teacher not in teachers:
        raise ConfigError(
            f"{where}: {key}={teacher!r} is no teacher of this run. Known are "
            f"{', '.join(teachers)}; set data.teacher_key if the key means something else."
        )
    return teacher


def _check_unicode(where: str, key: str, text: str) -> None:
    if not is_unicode(text):
        raise ConfigError(
            f"{where}: {key} is not valid Unicode: it holds half of a surrogate pair. {_LEAVE_OUT}"
        )


def _responses(value: Any) -> tuple[str, ...]:
    """None where there is no text, or anything but text."""
    texts = value if isinstance(value, list) else [value]
    is_text = all(
        isinstance(text, str) and not is_blank(text) and is_unicode(text) for text in texts
    )
    return tuple(texts) if is_text else ()


def places(wheres: Sequence[str]) -> str:
    """`FILE lines 3, 7-12` of `FILE line 3`, `FILE line 7`, …; of rows alike."""
    named = [where.rsplit(" ", 2) for where in wheres]
    path, word, _ = named[0]
    numbers = [int(number) for _, _, number in named]
    runs = [[numbers[0], numbers[0]]]
    for number in numbers[1:]:
        if number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return f"{path} {word}{'s' * (len(numbers) > 1)} {shown}"
