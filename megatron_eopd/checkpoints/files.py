"""The checkpoints of a run as files: which there are, and whether they are what was written.

A checkpoint is RUN_DIR/checkpoints/000120. `checksums.json` in it names every file with its size
and sha256 (so `sha256sum` can be asked too), and the file DONE is written last of all.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

from megatron_eopd.checkpoints.pace import Pace
from megatron_eopd.errors import CheckpointError
from megatron_eopd.tokens.file import TOKENS

DONE = "DONE"
CHECKSUMS = "checksums.json"
EVALUATIONS = "evaluations"
FORMAT = 1
READ_BYTES = 16 * 2**20
QUICK_BYTES = 16 * 2**20
"""Files up to this size are summed before a run's ranks meet; larger ones by all ranks together."""


class Sum(NamedTuple):
    num_bytes: int
    sha256: str


_NAME = re.compile(r"(\d+)(?:-(\d+))?")


def checkpoint_dir(run_dir: Path, iteration: int, steps_done: int = 0) -> Path:
    """`steps_done`: optimizer steps of the iteration after, where a run was stopped within it."""
    within = f"-{steps_done}" if steps_done else ""
    return run_dir / "checkpoints" / f"{iteration:06d}{within}"


def evaluation_dir(run_dir: Path, iteration: int, steps_done: int = 0) -> Path:
    """Named as the checkpoint of the same weights."""
    return run_dir / EVALUATIONS / checkpoint_dir(run_dir, iteration, steps_done).name


def place_of(directory: Path) -> tuple[int, int] | None:
    """(iteration, optimizer steps of the one after) by its name; None of what is none."""
    match = _NAME.fullmatch(directory.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def named(run_dir: Path) -> list[Path]:
    """What has the name of a checkpoint, the newest last. One without DONE is damaged, or was
    written by a version that gave names before."""
    return sorted(filter(place_of, (run_dir / "checkpoints").glob("[0-9]*")), key=place_of)


def complete(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest last."""
    return [path for path in named(run_dir) if (path / DONE).is_file()]


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return next(reversed(complete(run_dir)), None)


def set_aside_later(run_dir: Path, place: tuple[int, int]) -> list[Path]:
    """Where the complete checkpoints went that are of a later place, and evaluations and recordings
    of tokens of such weights, so that a run that starts again from an earlier one never takes them
    for its own."""
    evaluations = filter(place_of, sorted((run_dir / EVALUATIONS).glob("[0-9]*")))
    places = {path: place_of(path) for path in [*complete(run_dir), *evaluations]}
    recordings = sorted((run_dir / TOKENS).glob("[0-9]*.npz"))
    places |= {path: place_of(path.with_suffix("")) for path in recordings}
    moved = []
    for path, own_place in places.items():
        if own_place is not None and own_place > place:
            number = 1
            while (target := path.with_name(f"superseded-{path.name}-{number}")).exists():
                number += 1
            moved.append(path.rename(target))
    return moved


UNFINISHED, REPLACED = ".unfinished", ".replaced"
"""Behind the name of one that is being written, and of one that it takes the place of."""


def put_in_place(written: Path, final: Path) -> None:
    """Under the name by which it counts, which the file `latest` then has. An older one of that
    name is out of the way between two renames, and only then; see put_back."""
    replaced = final.with_name(f"{final.name}{REPLACED}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    written.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    pointer = final.with_name("latest.new")
    with pointer.open("w") as file:
        _write_through(file, f"{final.name}\n")
    pointer.replace(final.with_name("latest"))
    _sync_directory(final.parent)


def put_back(run_dir: Path) -> list[Path]:
    """Give the name back to complete checkpoints of a job that was killed between two renames. For
    who holds the run's lock alone: another job may be at just this."""
    back = []
    for suffix in (UNFINISHED, REPLACED):  # what was written last comes before what it replaces
        for path in sorted((run_dir / "checkpoints").glob(f"[0-9]*{suffix}")):
            final = path.with_suffix("")
            if place_of(final) and (path / DONE).is_file() and not final.exists():
                back.append(path.rename(final))
    return back


def to_remove(run_dir: Path, keep_last: int, keep_best: Path | None) -> list[Path]:
    """Complete checkpoints beyond those to keep, and what saves before the newest left behind."""
    kept = complete(run_dir)
    old = [path for path in kept[:-keep_last] if path != keep_best]
    newest_place = place_of(kept[-1])
    for path in (run_dir / "checkpoints").glob("[0-9]*.*"):
        place = place_of(Path(path.stem))
        if path.suffix in (UNFINISHED, REPLACED) and place and place <= newest_place:
            old.append(path)
    return old


def sum_files(paths: Iterable[Path], pace: Pace | None = None) -> dict[str, Sum]:
    """Name → what is in it; on return all of it is on the disk, whatever happens to the machine.
    `pace`: between pieces; None does not rest."""
    sums = {}
    for path in paths:
        with path.open("rb") as file:
            sums[path.name] = Sum(path.stat().st_size, _sha256(file, pace))
            os.fsync(file.fileno())
    return sums


def _sha256(file: BinaryIO, pace: Pace | None = None) -> str:
    """As hashlib.file_digest, in pieces so large that Python's lock changes hands seldom: the
    training runs beside it."""
    digest, buffer, pace = hashlib.sha256(), bytearray(READ_BYTES), pace or Pace()
    while num_bytes := file.readinto(buffer):
        digest.update(memoryview(buffer)[:num_bytes])
        pace()
    return digest.hexdigest()


def write_sums(directory: Path, sums: Mapping[str, Sum]) -> None:
    """And, behind it, DONE."""
    files = {name: found._asdict() for name, found in sorted(sums.items())}
    for name, text in (
        (CHECKSUMS, json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n"),
        (DONE, ""),
    ):
        with (directory / name).open("w") as file:
            _write_through(file, text)
    _sync_directory(directory)
    _sync_directory(directory.parent)


def _write_through(file: TextIO, text: str) -> None:
    """On return it is on the disk."""
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Names of files are the directory's content."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_sums(directory: Path) -> dict[str, Sum] | None:
    """None of a checkpoint from before there were any.

    Raises:
        CheckpointError: they cannot be read.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        return None
    try:
        files = json.loads(path.read_text())["files"]
        return {name: Sum(**found) for name, found in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}).") from None


def quick_problems(directory: Path) -> list[str]:
    """What is wrong with a complete checkpoint, as far as names, sizes and small files say."""
    try:
        sums = read_sums(directory)
    except CheckpointError as error:
        return [str(error)]
    if sums is None:
        return []
    small = [name for name, found in sums.items() if found.num_bytes <= QUICK_BYTES]
    return problems_of(directory, sums, small)


def problems_of(directory: Path, sums: Mapping[str, Sum], to_sum: Iterable[str]) -> list[str]:
    """Of all names and sizes, and of what is in the files `to_sum`."""
    problems = []
    for name, expected in sums.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected.num_bytes:
            problems.append(f"{name} has {path.stat().st_size} of {expected.num_bytes} bytes")
    wrong_already = {problem.split(" ", 1)[0] for problem in problems}
    for name in set(to_sum) - wrong_already:
        try:
            with (directory / name).open("rb") as file:
                is_same = _sha256(file) == sums[name].sha256
        except OSError as error:  # a bad sector
            problems.append(f"{name} cannot be read ({error.strerror})")
            continue
        if not is_same:
            problems.append(f"{name} has other content than was written")
    return sorted(problems)
