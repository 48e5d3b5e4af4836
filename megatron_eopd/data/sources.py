"""Rows of a file of any form. In: a path. Out: one dictionary a row, and where it stands.

JSON Lines, one JSON array, or parquet; text may be compressed. What a file holds decides which it
is, not its name.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tqdm import tqdm

from megatron_eopd.errors import ConfigError

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
"""(file, and line or row there; columns) of each row."""

BATCH_ROWS = 1000
"""Read at once from parquet; whole row groups of a large file would take gigabytes."""

PROGRESS_AFTER_S = 3
"""A shorter wait needs no bar."""

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_PARQUET = b"PAR1"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\xff\xfe": "UTF-16. Convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16. Convert it: iconv -f UTF-16 -t UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the data. Run git lfs pull",
    b"PK\x03\x04": "a zip archive. Unpack it",
    b"\xfd7zXZ": "compressed with xz. Unpack it, or use gzip or zstd",
    b"ARROW1": "an Arrow file. Write it as parquet",
    b"\xff\xff\xff\xff": "an Arrow stream, as Hugging Face's datasets keeps. Give the directory "
    "that save_to_disk wrote to tools/prepare_data.py, or write parquet with to_parquet",
    _PARQUET: "parquet inside another compression. Unpack it",
}
"""What a file may begin with that is no text, and what to do."""

_OPENING = re.compile(r"\s*\[\s*")
_COMMA = re.compile(r"\s*(?:,\s*|(?=\]))")

T = TypeVar("T")


class RowFile:
    """Its rows, each time it is iterated over.

    Raises, then or at once:
        ConfigError: no such file, not in one of these forms, damaged, or a row that is no object.
    """

    def __init__(self, path: Path) -> None:
        if is_saved_data_set(path):
            raise ConfigError(
                f"{path}: a data set that save_to_disk wrote. Make a file of its rows with "
                f"tools/prepare_data.py."
            )
        if path.is_dir():
            names = sorted(p.name for p in path.iterdir() if p.is_file())
            raise ConfigError(
                f"{path}: a directory. Name one of its files: {', '.join(names[:10]) or 'none'}."
            )
        if not path.is_file():
            raise ConfigError(f"{path}: no such file.")
        self.path = path
        self.size = path.stat().st_size
        """In bytes."""
        self.done = 0
        """Of these, how many have been read."""

    def __iter__(self) -> Rows:
        try:
            with self.path.open("rb") as file:
                is_parquet = file.peek(4).startswith(_PARQUET)
                yield from self._parquet_rows() if is_parquet else self._text_rows(file)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be read ({error.strerror or error}). Where it is damaged or "
                f"was cut short, copy it again."
            ) from None

    def _parquet_rows(self) -> Rows:
        # Here, as below: JSON does without it.
        import pyarrow
        import pyarrow.parquet

        numbers = count(1)
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
            for batch in file.iter_batches(BATCH_ROWS):
                for number, row in zip(numbers, batch.to_pylist(), strict=False):
                    self.done = self.size * number // file.metadata.num_rows
                    yield f"{self.path} row {number}", row
        except pyarrow.ArrowException as error:
            raise OSError(str(error).splitlines()[0]) from None

    def _text_rows(self, file: BinaryIO) -> Rows:
        stream = _decompressed(file)
        head = stream.peek(64)[:64]  # it gives what it has, which may be more
        _check_is_text(self.path, head)
        if head.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"["):
            yield from self._array_rows(stream.read())
        else:
            for number, line in enumerate(stream, start=1):
                self.done = file.tell()
                if line.strip():
                    where = f"{self.path} line {number}"
                    yield where, _object(where, line)

    def _array_rows(self, content: bytes) -> Rows:
        """One object after the other, so that the whole is held once, as text."""
        text = _decoded(str(self.path), content)
        end = _OPENING.match(text).end()
        for number in count(1):
            if text.startswith("]", end):
                break
            where = f"{self.path} row {number}"
            parse = partial(_DECODER.raw_decode, text, end)
            value, end = _parsed(where, text[end : end + 80], parse)
            self.done = self.size * end // len(text)
            yield where, _checked(where, value)
            comma = _COMMA.match(text, end)
            if comma is None:
                found = repr(text[end : end + 40].strip()) if text[end:].strip() else "the end"
                raise ConfigError(
                    f"{where}: behind it comes neither a comma nor the array's ], but {found}. "
                    f"Was the file cut short?"
                )
            end = comma.end()
        self.done = self.size
        rest = text[end + 1 :].strip()
        if rest:
            raise ConfigError(
                f"{self.path}: behind the array that it begins with comes {rest[:40]!r}. Write one "
                f"array of objects, or one object a line."
            )


def is_saved_data_set(path: Path) -> bool:
    """A directory that Hugging Face's datasets wrote: one split, or several."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def with_progress(rows: Iterable[T], files: Sequence[RowFile]) -> Iterator[T]:
    """The same, which come of these files, under a bar with the time that is left. Of the ranks
    that read the same files the first alone shows it."""
    with tqdm(
        desc=", ".join(file.path.name for file in files),
        total=sum(file.size for file in files) or None,
        unit="B",
        unit_scale=True,
        delay=PROGRESS_AFTER_S,
        leave=False,
        disable=None if os.environ.get("RANK", "0") == "0" else True,
    ) as bar:
        for row in rows:
            yield row
            bar.update(sum(file.done for file in files) - bar.n)


def _decompressed(file: BinaryIO) -> io.BufferedReader:
    head = file.peek(4)
    for magic, name in _COMPRESSIONS.items():
        if head.startswith(magic):
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(file, name))
    return file


def _check_is_text(path: Path, head: bytes) -> None:
    for magic, advice in _FOREIGN.items():
        if head.startswith(magic):
            raise ConfigError(f"{path}: {advice}.")
    start = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if b"\0" in head or (start and not start.startswith((b"{", b"["))):
        raise ConfigError(
            f"{path}: neither JSON, an object a line or an array, nor parquet. It begins with "
            f"{head[:20]!r}."
        )


def _decoded(where: str, content: bytes) -> str:
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        behind = f" {line} lines below its start" if line else ""
        raise ConfigError(
            f"{where}: not valid UTF-8{behind} ({error.reason}): "
            f"{content[max(error.start - 20, 0) : error.end + 20]!r}. Convert the file, for "
            f"example: iconv -f LATIN1 -t UTF-8"
        ) from None


def _object(where: str, line: bytes) -> Row:
    text = _decoded(where, line)
    return _checked(where, _parsed(where, text, partial(_DECODER.decode, text)))


def _parsed(where: str, shown: str, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except json.JSONDecodeError as error:
        cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        hint = " It ends in the middle: was it cut short, or is it one object over several lines?"
        raise ConfigError(
            f"{where}: not valid JSON ({error.msg}): {shown[:80].strip()!r}.{hint * cut}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise ConfigError(f"{where}: not valid JSON ({error}): {shown[:80]!r}.") from None


def _checked(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {json.dumps(value)[:80]}.")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> Row:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repetition)
