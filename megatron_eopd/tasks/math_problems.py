"""Problems of a file, or of a data set of the hub. In: its name, a preset. Out: Problems, in order.

All of a source is read before the first problem is given, so that all lines that cannot be used are
told at once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eopd.data.chats import read_chat
from megatron_eopd.data.prepare import data_set_rows, is_file
from megatron_eopd.data.prompt_files import places
from megatron_eopd.data.sources import RowFile, Rows
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn
from megatron_eopd.tasks.math_number import read_quantity
from megatron_eopd.tasks.task import Problem

if TYPE_CHECKING:
    from megatron_eopd.tasks.math import Preset


def read_problems(
    source: str | None, preset: "Preset", suffix: str, preset_name: str
) -> Iterator[Problem]:
    """
    Raises:
        ConfigError: a source that is missing or empty, or rows that cannot be used (which ones).
    """
    if source is None:
        raise ConfigError(
            f"The preset {preset_name} knows no data set. Name a file, or a data set of the hub as "
            f"NAME[:CONFIG[:SPLIT]]."
        )
    rows: Rows = iter(RowFile(Path(source))) if is_file(source) else data_set_rows(source)
    problems, unanswered = [], []
    for where, row in rows:
        prompt = _column(where, row, preset.prompts, "problem")
        answer = _answer(row[_column(where, row, preset.answers, "answer")], row, preset)
        chat = read_chat(f"{where}, column {prompt}", row[prompt] or "")
        if not answer or chat.empty_turn:
            unanswered.append(where)
        text = f"{chat.text}\n{suffix}" if suffix else chat.text
        context = tuple(Turn(*message) for message in chat.context)
        # Whatever its column holds, the answer is what a prompt file made of these rows has there.
        problems.append(Problem(where, text, answer, context, row | {"answer": answer}))
    if unanswered:
        raise ConfigError(
            f"{len(unanswered)} of {len(problems)} problems have no text or no answer"
            f"{' that is one plain number' * (preset.form == 'number')}, and could never be graded "
            f"right: {places(unanswered)}. Take these lines out."
        )
    if not problems:
        raise ConfigError(f"{source}: no problems in it.")
    return iter(problems)


def _column(where: str, row: dict[str, Any], names: tuple[str, ...], what: str) -> str:
    present = [name for name in names if name in row]
    if not present:
        raise ConfigError(
            f"{where}: no column with the {what}: {' or '.join(names)}. There are "
            f"{', '.join(row) or 'none'}."
        )
    return next((name for name in present if row[name] not in (None, "")), present[0])


def _answer(value: Any, row: dict[str, Any], preset: "Preset") -> str:
    """Empty where there is none. OlympiadBench has lists, and how far from a number one may be."""
    from megatron_eopd.tasks.math import plain_number, with_tolerance

    values = value if isinstance(value, list) else [value]
    present = [each for each in values if each is not None and each == each]  # not NaN
    answer = ", ".join(preset.clean(str(each)) for each in present)
    if preset.form == "number":
        return answer if plain_number(answer) is not None else ""
    error = str(row.get("error") or "")
    is_tolerance = answer and (quantity := read_quantity(error)) is not None and quantity.value > 0
    return with_tolerance(answer, error) if is_tolerance else answer
