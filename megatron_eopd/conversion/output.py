"""The output directory of a conversion: unfinished under another name until it is complete.

An interrupted conversion leaves OUT.unfinished, which the same command goes on with; OUT itself
appears in one piece, or not at all.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from megatron_eopd.errors import CheckpointError, ConfigError
from megatron_eopd.model_paths import checkpoints_in
from megatron_eopd.parallel.collectives import collecting, from_rank_zero, raise_together
from megatron_eopd.parallel.init import ParallelContext

_IDENTITY = "conversion.json"


def open_output(
    out: Path,
    source: Path,
    overwrite: bool,
    identity: dict,
    num_bytes: int,
    context: ParallelContext,
    below: str = "",
) -> Path:
    """The directory to write into, with whatever an interrupted conversion left there.

    identity: what makes the files what they are; another one starts anew.
    below: the directory in it that the files will be in.

    Raises:
        ConfigError: `out` exists, or holds the source or other checkpoints. CheckpointError: it
            cannot be written, or there is not enough space on the disk.
    """

    def prepare() -> Path:
        _check_replaceable(out, source, overwrite, below)
        unfinished = out.with_name(out.name + ".unfinished")
        mark = unfinished / _IDENTITY
        text = json.dumps(identity, indent=2, sort_keys=True)
        with _disk_errors(unfinished):
            if not mark.is_file() or mark.read_text() != text:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
                mark.write_text(text)
        missing = num_bytes - bytes_in(unfinished)
        free = shutil.disk_usage(unfinished).free
        if missing > free:
            raise CheckpointError(
                f"{unfinished}: {missing / 1e9:.2f} GB are to be written, and only "
                f"{free / 1e9:.2f} GB of the disk are free. Make room, or convert elsewhere."
            )
        return unfinished

    return from_rank_zero(prepare, context.cpu_group)


def _check_replaceable(out: Path, source: Path, overwrite: bool, below: str) -> None:
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"{out} holds the source, {source}. Give another directory.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file. Give a directory.")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists. Give another directory, or --overwrite to replace it.")
    others = [name for name in checkpoints_in(out) if name != below]
    if others:
        raise ConfigError(
            f"{out} also holds {', '.join(others)}, which --overwrite would remove. Give another "
            f"directory, or move them away."
        )


def write_parts(
    count: int,
    is_written: Callable[[int], bool],
    write: Callable[[int], None],
    directory: Path,
    num_bytes: int,
    context: ParallelContext,
) -> None:
    """`write(number)` of every number below `count` that is not yet written, dealt out to the
    ranks, under a progress bar on rank 0.

    Raises:
        CheckpointError: on every rank, when a file of any rank could not be written.
    """
    layout = context.layout
    # One rank looks for all: a late one would already find what the others have written by then,
    # and deal out other numbers.
    left = from_rank_zero(
        lambda: [number for number in range(count) if not is_written(number)], context.cpu_group
    )
    errors: list[Exception] = []
    with _progress(directory, num_bytes, shown=layout.rank == 0):
        with collecting(errors), _disk_errors(directory):
            for number in left[layout.rank :: layout.world_size]:
                write(number)
        raise_together(errors, context.cpu_group)


def finish_output(
    unfinished: Path, out: Path, last_files: Callable[[], None], context: ParallelContext
) -> None:
    """Write what makes the directory complete, and give it its name."""

    def finish() -> None:
        with _disk_errors(unfinished):
            last_files()
            (unfinished / _IDENTITY).unlink()
            replaced = out.with_name(out.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if out.exists():
                out.rename(replaced)
            unfinished.rename(out)
            shutil.rmtree(replaced, ignore_errors=True)

    from_rank_zero(finish, context.cpu_group)


def bytes_in(directory: Path) -> int:
    """Of all files, also those that grow or are renamed meanwhile."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be written ({error}). What is there is kept: once it can be "
            f"written, the same command goes on where this one stopped."
        ) from error


@contextmanager
def _progress(directory: Path, num_bytes: int, shown: bool) -> Iterator[None]:
    """Shows what all ranks have on the disk together; nobody counts for another."""
    stopped = threading.Event()

    def watch(bar: tqdm) -> None:
        while not stopped.wait(0.2):
            bar.update(min(bytes_in(directory), num_bytes) - bar.n)

    with tqdm(
        total=num_bytes, unit="B", unit_scale=True, desc=directory.stem, disable=not shown
    ) as bar:
        thread = threading.Thread(target=watch, args=(bar,), daemon=True)
        if shown:
            bar.update(bytes_in(directory))
            thread.start()
        try:
            yield
            bar.update(num_bytes - bar.n)
        finally:
            stopped.set()
            if shown:
                thread.join()
