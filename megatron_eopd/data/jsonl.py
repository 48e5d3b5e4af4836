"""Lines of a jsonl file. In: a path. Out: one object a line, and where it stands."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eopd.errors import ConfigError


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line number, object) of every line that is not blank.

    Raises:
        ConfigError: a line that is no JSON object.
    """
    # Bytes: as text, a line would also end at the U+2028 that may stand inside a JSON string.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield where, _object(where, line)


def _object(where: str, line: bytes) -> dict[str, Any]:
    shown = repr(line[:80].decode(errors="replace"))
    try:
        value = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ConfigError(f"{where}: not valid JSON ({error}): {shown}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {shown}")
    return value
