"""Write a Megatron distributed checkpoint, part by part. In: parameters. Out: torch_dist files.

See mcore_files.py for the format.
"""

import io
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_eopd.errors import CheckpointError
from megatron_eopd.models.mcore_files import CHUNK_BYTES, pieces_of, stored_shape


@dataclass(frozen=True)
class Source:
    """A parameter to be written: where the checkpoint puts it, and how to get it."""

    item: ShardedBase
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    """Called once, when its bytes are about to be written."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class MCoreWriter:
    """Writes a checkpoint part by part, each a file of its own, by any rank in any order.

    A part is complete when its list of contents lies beside it; `finish` makes one description
    out of all lists.
    """

    def __init__(
        self, directory: Path, parts: Sequence[Sequence[Source]], objects: dict[str, bytes]
    ) -> None:
        """objects: what Megatron keeps beside tensors, by key, as torch.save writes it."""
        self._directory = directory
        self._parts = parts
        self._writer = FileSystemWriter(directory, overwrite=True)
        self._objects = objects
        plans = [SavePlan(_write_items(sources)) for sources in parts]
        plans[0].items.extend(object_item(key) for key in objects)
        self._plans = self._writer.prepare_global_plan(plans)

    def is_written(self, number: int) -> bool:
        return self._contents(number).is_file()

    def write_part(self, number: int) -> None:
        planner = _LazyPlanner(self._parts[number], self._objects)
        with failed_writes_as_os_errors():
            results = self._writer.write_data(self._plans[number], planner).wait()
        unfinished = self._contents(number).with_suffix(".partial")
        unfinished.write_bytes(pickle.dumps(results))
        unfinished.rename(self._contents(number))

    def finish(self, common: dict[str, Any]) -> None:
        """Once, after all parts are written.

        common: what belongs to no tensor, for Megatron-LM; a run has no need of it.
        """
        lists = [self._contents(number) for number in range(len(self._parts))]
        results: list[list[WriteResult]] = [pickle.loads(path.read_bytes()) for path in lists]
        describe(self._directory, self._plans, results, common)
        for path in lists:
            path.unlink()

    def _contents(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.written"


def shard_item(
    key: str, chunk: ChunkStorageMetadata, global_shape: Sequence[int], dtype: torch.dtype
) -> WriteItem:
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(global_shape))
    return WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def serialised(value: Any) -> bytes:
    """An object as torch.save writes it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def object_item(key: str) -> WriteItem:
    return WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)


def describe(
    directory: Path,
    plans: Sequence[SavePlan],
    results: Sequence[Sequence[WriteResult]],
    common: dict[str, Any],
) -> None:
    """Written last: which file holds which piece of which tensor. `common`: see MCoreWriter."""
    _, metadata = create_default_global_save_plan(list(plans))
    FileSystemWriter(directory, overwrite=True).finish(metadata, list(results))
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    # 0.16 asks for this file; 0.19 keeps its like elsewhere and still reads this one.
    torch.save(common, directory / "common.pt")


@contextmanager
def failed_writes_as_os_errors() -> Iterator[None]:
    """torch.save covers an OSError (a full disk) with a RuntimeError over what it then finds."""
    try:
        yield
    except CheckpointError:
        raise
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _write_items(sources: Sequence[Source]) -> list[WriteItem]:
    items = []
    for source in sources:
        meta = torch.empty(source.shape, dtype=source.dtype, device="meta")
        for piece in pieces_of(source.item, meta):
            for rows in _row_chunks(piece):
                chunk = _chunk(piece, rows)
                items.append(shard_item(piece.key, chunk, piece.global_shape, source.dtype))
    return items


def _row_chunks(piece: ShardedTensor) -> Iterator[slice]:
    rows = piece.data.shape[0]
    step = max(CHUNK_BYTES // max(piece.data[:1].nbytes, 1), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _chunk(piece: ShardedTensor, rows: slice) -> ChunkStorageMetadata:
    axis = piece.prepend_axis_num
    offsets, sizes = list(piece.global_offset), list(stored_shape(piece))
    offsets[axis] += rows.start
    sizes[axis] = rows.stop - rows.start
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


class _LazyPlanner(DefaultSavePlanner):
    """Hands out the chunks of one part in order, holding one parameter at a time."""

    def __init__(self, sources: Sequence[Source], objects: dict[str, bytes]) -> None:
        super().__init__()
        self._chunks = _chunks_in_order(sources)
        self._objects = objects

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        index, tensor = next(self._chunks)
        assert index == write_item.index, f"{write_item.index} asked for, {index} is next"
        return tensor


def _chunks_in_order(sources: Sequence[Source]) -> Iterator[tuple[MetadataIndex, torch.Tensor]]:
    for source in sources:
        # A call of its own, so that nothing holds this parameter when the next one is made.
        yield from _chunks_of(source)


def _chunks_of(source: Source) -> Iterator[tuple[MetadataIndex, torch.Tensor]]:
    for piece in pieces_of(source.item, source.make()):
        for rows in _row_chunks(piece):
            chunk = _chunk(piece, rows)
            yield MetadataIndex(piece.key, chunk.offsets), piece.data[rows].view(chunk.sizes)
