"""Text and JSON files of a model directory, read so that what is wrong with one is said by name.

In: a path. Out: its text or its object. Downloads leave files that are no such thing, empty ones
and pointers that git-lfs should have replaced; some editors write UTF-16.
"""

import codecs
import json
from pathlib import Path
from typing import Any

from megatron_eopd.errors import ConfigError

_LFS_POINTER = b"version https://git-lfs"
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""What an editor puts before text to say its encoding; no reader of these files takes one."""


def check_is_content(path: Path) -> None:
    """
    Raises:
        ConfigError: an empty file, or one that stands for the content.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head.strip():
        raise ConfigError(f"{path}: the file is empty. Copy or download it again.")
    if head.startswith(_LFS_POINTER):
        raise ConfigError(
            f"{path}: a git-lfs pointer, not the file itself. Run `git lfs pull` there, or "
            f"download it again."
        )
    if head.startswith(_MARKS):
        raise ConfigError(
            f"{path}: begins with a byte order mark, as UTF-16 text does. Save it as UTF-8 without "
            f"one."
        )


def read_text(path: Path) -> str:
    """
    Raises:
        ConfigError: as `check_is_content`, or not UTF-8.
    """
    check_is_content(path)
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}). Download it again.") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: as `read_text`, or no JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {str(value)[:80]}.")
    return value
