"""Tasks by name. In: a word of `evaluation.tasks` or `data.prompts`. Out: a Task."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_eopd.config import EvaluationConfig, task_parts
from megatron_eopd.data.prompt_files import Row
from megatron_eopd.errors import ConfigError
from megatron_eopd.tasks.countdown import Countdown
from megatron_eopd.tasks.math import PRESETS, MathTask
from megatron_eopd.tasks.task import Problem, Task

METHODS = ("problems", "grade", "right_response", "num_right", "graders")
OF_ANY_FILE = ("math", "number")
"""Presets that are named after their file."""


def open_tasks(options: EvaluationConfig, *, with_suffix: bool) -> list[Task]:
    """`with_suffix`: append what a task says about the form of answers; False where the prompts
    have a suffix of the user's.

    Raises:
        ConfigError: no such task, or two of one name, whose figures would be one.
    """
    tasks = [_open(text, options.data_dir, with_suffix) for text in options.tasks]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"evaluation.tasks={', '.join(options.tasks)}: two tasks are called {name}, which "
                f"names their figures and files. Rename a file, or evaluate one after the other."
            )
    return tasks


def _open(text: str, data_dir: Path, with_suffix: bool) -> Task:
    word, source = task_parts(text)
    if ":" in word:
        return _own(word, source)
    if word == "countdown":
        if source is not None:
            raise ConfigError(f"evaluation.tasks={text}: countdown makes its problems itself.")
        return Countdown()
    if word not in PRESETS:
        known = ", ".join(["countdown", *PRESETS])
        raise ConfigError(
            f"evaluation.tasks={text}: no task {word}. There are {known}; one of your own is named "
            f"module:Class."
        )
    return _math(word, source, data_dir, with_suffix)


def _math(word: str, source: str | None, data_dir: Path, with_suffix: bool) -> MathTask:
    preset = PRESETS[word]
    if source is None:
        beside = data_dir / f"{word}.jsonl"
        source = str(beside) if beside.exists() else preset.hub
    if source is None:
        raise ConfigError(
            f"evaluation.tasks={word}: which problems? Write {word}=FILE, or put them into "
            f"{data_dir / word}.jsonl (evaluation.data_dir={data_dir})."
        )
    name = _name_of(source) if word in OF_ANY_FILE else word
    return MathTask(name, source, word, None if with_suffix else "")


def _name_of(source: str) -> str:
    """Of a file or a data set, without what no other file's name should have."""
    return re.sub(r"\W+", "_", Path(source).name.lstrip(".").split(".")[0]).strip("_") or "problems"


def _own(word: str, source: str | None) -> Task:
    """module:Class, constructed with the source if there is one."""
    module, _, name = word.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"evaluation.tasks={word}: {error}. The module must be found from the working "
            f"directory or by PYTHONPATH."
        ) from None
    task = kind() if source is None else kind(source)
    missing = [method for method in METHODS if not callable(getattr(task, method, None))]
    if missing or not re.fullmatch(r"[\w.-]+", str(getattr(task, "name", ""))):
        raise ConfigError(
            f"evaluation.tasks={word}: {name} has no {', '.join(missing) or 'name of letters'}. A "
            f"task has what megatron_eopd/tasks/task.py says."
        )
    return task


def row_of(problem: Problem) -> Row:
    columns = {"answer": problem.answer, **(problem.columns or {})}
    row = Row(problem.where, problem.text, problem.answer, context=problem.context)
    return row._replace(columns=columns)


def training_rows(name: str) -> Iterator[Row] | None:
    """Of a built-in task; None where `data.prompts` is a file."""
    return map(row_of, Countdown().training_problems()) if name == "countdown" else None
