"""What one rank writes of a checkpoint, and how all ranks complete it. In: pieces. Out: files.

On the thread that calls it, or on one of its own beside the training.
"""

import io
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from time import monotonic

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_eopd.checkpoints import files
from megatron_eopd.checkpoints.contents import (
    items_of,
    objects_of,
    pieces_to_write,
    rng_key,
    rng_state,
)
from megatron_eopd.checkpoints.pace import Pace
from megatron_eopd.checkpoints.position import Position, write_position
from megatron_eopd.errors import (
    CheckpointError,
)
from megatron_eopd.host_memory import host_memory_like
from megatron_eopd.models.hf_files import copy_side_files
from megatron_eopd.models.mcore_files import stored_shape
from megatron_eopd.models.mcore_writer import (
    describe,
    failed_writes_as_os_errors,
    object_item,
    shard_item,
)
from megatron_eopd.parallel.collectives import (
    collecting,
    gather_on_rank_zero,
    lost_rank,
    raise_together,
    tells_of_lost_rank,
)
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.training.optimizer import Trainable

BACKGROUND_NICENESS = 15
"""Of the writing thread: Linux gives it a thirtieth of a core that the training wants."""
BACKGROUND_SHARE = 0.1
"""Of the time that the thread works; in the rest it sleeps. The kernel writes in the background for
it, without its low priority, and would slow a step down by half where every core trains."""


@dataclass
class OwnPart:
    """What this rank writes."""

    items: list[WriteItem]
    data: list[torch.Tensor | bytes | None]
    """Of each item, until it is written."""

    @property
    def num_bytes(self) -> int:
        return sum(d.nbytes if isinstance(d, torch.Tensor) else len(d) for d in self.data)

    def stage(self, buffers: list[torch.Tensor]) -> bool:
        """Copy it, so that training may go on; False where there is no memory for that. `buffers`:
        of the save before, empty at first; fresh memory for each would be taken from what the next
        step is used to have at hand."""
        tensors = [n for n, value in enumerate(self.data) if isinstance(value, torch.Tensor)]
        if not buffers:
            try:
                buffers += host_memory_like([self.data[n] for n in tensors])
            except (RuntimeError, MemoryError):  # torch has the first for host memory
                return False
        for number, buffer in zip(tensors, buffers, strict=True):
            self.data[number] = buffer.copy_(self.data[number])
        return True

    def add(self, item: WriteItem, data: torch.Tensor | bytes) -> None:
        self.items.append(item)
        self.data.append(data)


def part_of_rank(
    student: Trainable, more: Iterable[ShardedTensor], context: ParallelContext
) -> OwnPart:
    rank, world_size = context.layout.rank, context.layout.world_size
    own = OwnPart([], [])
    students = (piece for item in items_of(student) for piece in pieces_to_write(item))
    for piece in chain(students, more):
        sizes = stored_shape(piece)
        chunk = ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size(sizes))
        own.add(
            shard_item(piece.key, chunk, piece.global_shape, piece.dtype),
            piece.data.view(sizes),
        )
    for key, content in {**objects_of(student), rng_key(rank, world_size): rng_state()}.items():
        own.add(object_item(key), content)
    return own


def unfinished(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}{files.UNFINISHED}")


def begin_directory(
    directory: Path, hf_path: Path, position: Position, texts: Mapping[str, str]
) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    copy_side_files(hf_path, directory)
    write_position(directory, position)
    for name, text in texts.items():
        (directory / name).write_text(text)


class _Planner(DefaultSavePlanner):
    """Hands out what one rank writes, and forgets it.

    torch's writer holds on to the last piece that it wrote of each name, which together may be all
    of them. So it is given numbers under one name.
    """

    def __init__(self, own: OwnPart, pace: Callable[[], None]) -> None:
        super().__init__()
        self._own, self._pace = own, pace

    def plan(self) -> SavePlan:
        numbers = (MetadataIndex("", torch.Size([n])) for n in range(len(self._own.items)))
        pairs = zip(self._own.items, numbers, strict=True)
        return SavePlan([replace(item, index=number) for item, number in pairs])

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        self._pace()
        (number,) = write_item.index.offset
        value, self._own.data[number] = self._own.data[number], None
        return value if isinstance(value, torch.Tensor) else io.BytesIO(value)

    def named(self, results: Sequence[WriteResult]) -> list[WriteResult]:
        items = self._own.items
        return [replace(r, index=items[r.index.offset[0]].index) for r in results]


class Writing:
    """One save's second half."""

    def __init__(
        self,
        directory: Path,
        own: OwnPart,
        context: ParallelContext,
        group: dist.ProcessGroup,
        completed: Callable[[Path, float], None],
        begin: float,
    ) -> None:
        """`group`: all ranks, and nobody else uses it now. `begin`: of the save, by monotonic()."""
        self.directory, self._own, self._completed = directory, own, completed
        self._rank, self._group = context.layout.rank, group
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._error: BaseException | None = None
        self._pace = Pace()
        self._begin = begin
        self.whole_s: float | None = None

    def start(self) -> None:
        self._pace = Pace(BACKGROUND_SHARE)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, minutes: float) -> bool:
        """Whether it ended by then.

        Raises:
            CheckpointError: it has failed, on all ranks.
        """
        self._pace.hurry()
        self._thread.join(60 * minutes)
        if self._error is not None:
            raise self._error
        return self.is_over

    def _run(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICENESS)
            self.write()
        except BaseException as error:  # raised where the run waits for it
            self._error = error

    def write(self) -> None:
        """Collective."""
        with saving_errors(self.directory):
            directory = unfinished(self.directory)
            errors: list[Exception] = []
            with collecting(errors), failed_writes_as_os_errors():
                plan, results, sums = _write_own(directory, self._own, self._rank, self._pace)
            raise_together(errors, self._group)
            every = gather_on_rank_zero((plan, results, sums), self._group)
            with collecting(errors):
                if every is not None:
                    _finish(directory, self.directory, every)
                    self._completed(self.directory, monotonic() - self._begin)
            raise_together(errors, self._group)
        self.whole_s = monotonic() - self._begin - self._pace.slept_s


Told = tuple[SavePlan, list[WriteResult], dict[str, files.Sum]]
"""What a rank has written, and where."""


def _write_own(directory: Path, own: OwnPart, rank: int, pace: Pace) -> Told:
    # Copying ahead would use this thread's current GPU, which is the first for every rank.
    writer = FileSystemWriter(directory, overwrite=True, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(False, rank=rank, use_collectives=False)  # names files by rank
    planner = _Planner(own, pace)
    plan = writer.prepare_local_plan(planner.plan())
    results = planner.named(writer.write_data(plan, planner).wait())
    names = {result.storage_data.relative_path for result in results}
    return (
        SavePlan(own.items),
        results,
        files.sum_files((directory / name for name in sorted(names)), pace),
    )


def _finish(directory: Path, final: Path, every: Sequence[Told]) -> None:
    """By rank 0: description, sums, DONE, and the name under which a run finds it."""
    plans, results, sums = zip(*every, strict=True)
    check_complete(plans)
    describe(directory, plans, results, common={})
    own = {name: found for of_rank in sums for name, found in of_rank.items()}
    others = [path for path in directory.iterdir() if path.name not in own]
    files.write_sums(directory, own | files.sum_files(others))
    files.put_in_place(directory, final)


def check_complete(plans: Sequence[SavePlan]) -> None:
    """All ranks together must have written every element of every tensor once."""
    written: dict[str, int] = {}
    whole = {}
    for item in (item for plan in plans for item in plan.items):
        if item.tensor_data is not None:
            key = item.index.fqn
            written[key] = written.get(key, 0) + item.tensor_data.chunk.sizes.numel()
            whole[key] = item.tensor_data.size.numel()
    wrong = [key for key in whole if written[key] != whole[key]]
    assert not wrong, f"{len(wrong)} tensors are not written whole, {wrong[0]} among them"


@contextmanager
def saving_errors(directory: Path) -> Iterator[None]:
    """Whatever writing raises; the last checkpoint that is complete stays."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if tells_of_lost_rank(error):
            raise lost_rank(error, f"saving {directory}") from error
        raise CheckpointError(
            f"{directory}: the checkpoint cannot be written ({error}). Earlier ones are whole. "
            f"Make room, or see to it that all ranks may write there, and start the same command "
            f"again."
        ) from error
