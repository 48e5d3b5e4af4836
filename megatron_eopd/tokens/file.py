"""A TokenRecord on the disk: a numpy .npz, of which `np.load` reads each column by its name.

RUN_DIR/tokens/000120.npz of training, RUN_DIR/evaluations/000120/TASK.tokens.npz of evaluations.
Texts are JSON, in the column `about`. The file appears whole or not at all.
"""

import io
import json
import struct
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eopd.errors import ConfigError
from megatron_eopd.tokens.record import (
    SIGNALS,
    TOP,
    About,
    Piece,
    RecordedPrompt,
    RecordedResponse,
    TokenRecord,
)

FORMAT = 2
"""1 does not say what a teacher reads in the place of a prompt."""
READABLE = (1, FORMAT)
TOKENS = "tokens"
SUFFIX = ".tokens.npz"
"""Of the file of an evaluation's task."""
UNREADABLE = (
    *(ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, OverflowError),
    *(SyntaxError, zipfile.BadZipFile, zlib.error, struct.error),
)
"""What numpy and zipfile raise at bytes that are no recording."""


def training_file(run_dir: Path, iteration: int) -> Path:
    return run_dir / TOKENS / f"{iteration:06d}.npz"


def evaluation_file(directory: Path, task: str) -> Path:
    return directory / f"{task}{SUFFIX}"


def unfinished_of(path: Path) -> Path:
    """The name of a recording that is still being written."""
    return path.with_suffix(".unfinished")


def write_tokens(path: Path, record: TokenRecord) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {
        "format": FORMAT,
        "about": asdict(record.about),
        "prompts": [prompt._asdict() for prompt in record.prompts],
        "responses": [response._asdict() for response in record.responses],
    }
    ids = sorted(record.pieces)
    contents = [record.pieces[i].content for i in ids]
    unfinished = unfinished_of(path)
    with unfinished.open("wb") as file:
        np.savez_compressed(
            file,
            about=np.frombuffer(json.dumps(texts).encode(), np.uint8),
            ids=record.ids_T,
            **{f"signal_{name}": values_T for name, values_T in record.signals.items()},
            student_rank=record.student_rank_T,
            teacher_rank=record.teacher_rank_T,
            top_rows=record.top_rows_G,
            top_ids=record.top_ids_GK,
            top_student_logprobs=record.top_student_logprobs_GK,
            top_teacher_logprobs=record.top_teacher_logprobs_GK,
            piece_ids=np.array(ids, np.int32),
            piece_lengths=np.array([len(content) for content in contents], np.int32),
            piece_bytes=np.frombuffer(b"".join(contents), np.uint8),
            piece_special=np.array([record.pieces[i].is_special for i in ids], bool),
        )
    unfinished.replace(path)


def read_tokens(path: Path) -> TokenRecord:
    """
    Raises:
        ConfigError: there is none, it cannot be read, it was cut short, another version wrote it,
            or its parts do not fit each other.
    """
    texts, columns = _parts(path, _bytes(path))
    found = texts.get("format") if isinstance(texts, dict) else None
    if found not in READABLE:
        raise ConfigError(
            f"{path}: a recording of tokens of format {found}, and this version reads formats "
            f"{' and '.join(map(str, READABLE))}. Show it with the version that wrote it, or "
            f"record anew."
        )
    try:
        record = _record(texts, columns)
        fits = _fits(record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path}: damaged ({error!r}). Remove it.") from None
    if not fits:
        raise ConfigError(f"{path}: damaged (columns that do not fit each other). Remove it.")
    return record


def _bytes(path: Path) -> bytes:
    """All of it before any is looked into: what the disk says is no damage of the recording."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: there is no recording of tokens.") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Ask for the right to read it, or see to "
            f"the disk; the recording itself may be whole."
        ) from None


def _parts(path: Path, content: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """The texts, and the columns by name."""
    try:
        file = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        columns = {name: file[name] for name in file.files}
        return json.loads(columns.pop("about").tobytes()), columns
    except UNREADABLE as error:
        raise ConfigError(
            f"{path}: no whole recording of tokens ({error}). It was cut short or is another "
            f"file: remove it."
        ) from None


def _record(texts: dict[str, Any], columns: dict[str, np.ndarray]) -> TokenRecord:
    prompts = tuple(
        RecordedPrompt(**prompt | {"ids": tuple(prompt["ids"])}) for prompt in texts["prompts"]
    )
    return TokenRecord(
        about=About(**texts["about"]),
        prompts=prompts,
        responses=tuple(RecordedResponse(**response) for response in texts["responses"]),
        ids_T=columns["ids"],
        signals={name: columns[f"signal_{name}"] for name in SIGNALS},
        student_rank_T=columns["student_rank"],
        teacher_rank_T=columns["teacher_rank"],
        top_rows_G=columns["top_rows"],
        top_ids_GK=columns["top_ids"],
        top_student_logprobs_GK=columns["top_student_logprobs"],
        top_teacher_logprobs_GK=columns["top_teacher_logprobs"],
        pieces=_pieces(columns),
    )


def _pieces(columns: dict[str, np.ndarray]) -> dict[int, Piece]:
    content, ends = columns["piece_bytes"].tobytes(), columns["piece_lengths"].cumsum().tolist()
    starts = [0, *ends[:-1]]
    rows = zip(
        columns["piece_ids"].tolist(), starts, ends, columns["piece_special"].tolist(), strict=True
    )
    return {i: Piece(content[start:end], special) for i, start, end, special in rows}


def _fits(record: TokenRecord) -> bool:
    """Whether everything that is named is there."""
    count, rows = record.starts[-1], len(record.top_rows_G)
    arrays = [record.ids_T, record.student_rank_T, record.teacher_rank_T, *record.signals.values()]
    tops = [
        record.top_ids_GK,
        record.top_student_logprobs_GK,
        record.top_teacher_logprobs_GK,
    ]
    fits = all(each.shape == (count,) for each in arrays)
    fits &= all(each.shape == (rows, 2 * TOP) for each in tops)
    fits &= all(0 <= r.prompt < len(record.prompts) for r in record.responses)
    fits &= bool(((record.top_rows_G >= 0) & (record.top_rows_G < count)).all())
    named = {*np.unique(record.top_ids_GK).tolist()} - {-1} | {*np.unique(record.ids_T).tolist()}
    return fits and named <= record.pieces.keys()
