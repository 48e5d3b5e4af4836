"""A Megatron distributed checkpoint on disk, tensor by tensor.

Megatron-Core itself loads and saves whole models (checkpoint.py). Converting needs one tensor at a
time, so this file goes one level down, to torch.distributed.checkpoint, which defines the format
(`torch_dist`): `.metadata` says which file holds which piece of which tensor, and Megatron adds
`metadata.json` and `common.pt`. Keys and shapes still come from Megatron's own sharded_state_dict.
"""

import io
import math
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_eopd.errors import CheckpointError
from megatron_eopd.model_paths import resolve_checkpoint
from megatron_eopd.models.hf_files import fingerprint
from megatron_eopd.models.mcore_keys import EMBEDDING, style_of
from megatron_eopd.parallel.collectives import lost_rank, tells_of_lost_rank

CHUNK_BYTES = 32 * 2**20
"""Tensors are stored in rows of about this size, so that neither side ever holds one twice."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Offsets = tuple[int, ...]


@contextmanager
def loading_errors(path: Path) -> Iterator[None]:
    """Turn what Megatron-Core and torch raise over a bad checkpoint into a CheckpointError."""
    try:
        yield
    except (
        CheckpointingException,
        CheckpointException,  # a BaseException
        pickle.UnpicklingError,
        EOFError,
        OSError,
        RuntimeError,
        KeyError,
    ) as error:
        # torch's CheckpointException carries every rank's error; one is enough to act on.
        failures = getattr(error, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else error
        if tells_of_lost_rank(cause):
            raise lost_rank(cause, f"loading {path}") from error
        raise CheckpointError(
            f"{path}: cannot be loaded ({type(cause).__name__}: {cause}). The checkpoint is "
            f"damaged, or belongs to another model."
        ) from error


def pieces_of(item: ShardedBase, data: torch.Tensor) -> list[ShardedTensor]:
    """How the checkpoint addresses a parameter: one tensor, or several views of `data` where
    Megatron cuts it up (gate and up projection, so that every tensor-parallel size can load)."""
    if isinstance(item, ShardedTensorFactory):
        return list(nested_values(replace(item, data=data).build()))
    assert isinstance(item, ShardedTensor), item
    return [replace(item, data=data, dtype=data.dtype)]


class MCoreCheckpoint:
    """Reads any part of any tensor: the weights that a path means, by whatever keys they have.

    Raises:
        CheckpointError: the checkpoint was not finished, its description is damaged, or it has
            another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = resolve_checkpoint(path)
        if not (path / ".metadata").is_file():
            raise _unfinished(path, ".metadata")
        self._chunks_of: dict[str, dict[Offsets, list[ChunkStorageMetadata]]] = {}
        self._reader = FileSystemReader(self.path)
        try:
            self._metadata = self._reader.read_metadata()
            problems = list(self._file_problems())
        except Exception as error:  # a damaged pickle raises nearly anything
            raise CheckpointError(
                f"{path}/.metadata: cannot be read ({type(error).__name__}: {error}). The file is "
                f"damaged: copy it again."
            ) from error
        if problems:
            raise CheckpointError(
                f"{path}: files are missing or truncated: {', '.join(problems)}. Copy it again."
            )
        self._keys = self._metadata.state_dict_metadata
        self._style = style_of(self._keys)
        self.is_megatrons = (path / "metadata.json").is_file()
        """Else torch's own (Megatron-LM's torch_dcp and fsdp_dtensor), of a state dict in another,
        whose keys therefore have a prefix."""
        if not self.is_megatrons and not self._style.prefix:
            raise _unfinished(path, "metadata.json")

    def _file_problems(self) -> Iterator[str]:
        ends: dict[str, int] = defaultdict(int)
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        for name, end in sorted(ends.items()):
            path = self.path / name
            if not path.is_file():
                yield f"{name} (missing)"
            elif path.stat().st_size < end:
                yield f"{name} ({path.stat().st_size} of {end} bytes)"

    def fingerprint(self) -> list:
        """Changes when the checkpoint does."""
        return fingerprint([self.path / ".metadata"])

    def check_megatron_reads_it(self) -> None:
        """
        Raises:
            CheckpointError: Megatron-Core itself has no way to load it.
        """
        if not self.is_megatrons:
            raise CheckpointError(
                f"{self.path}: is a checkpoint of torch.distributed.checkpoint (Megatron-LM's "
                f"torch_dcp or fsdp_dtensor), which Megatron-Core cannot load. Convert it first: "
                f"python tools/convert_hf.py to-hf {self.path} OUT_DIR. (check compares its "
                f"tensors with --no-logits.)"
            )

    def stored_as(self, item: ShardedBase) -> ShardedBase:
        """The item of Megatron's state under the keys of this checkpoint."""
        if not isinstance(item, ShardedTensorFactory):
            return self._style.ask(item, self._keys) if isinstance(item, ShardedTensor) else item

        def build(*args: Any) -> list[ShardedBase]:
            return [self.stored_as(piece) for piece in item.build_fn(*args)]

        return replace(item, build_fn=build)

    def dtype(self, piece: ShardedTensor) -> torch.dtype:
        return self._keys[piece.key].properties.dtype

    def embedding_dtype(self) -> torch.dtype:
        return self._keys[self._style.prefix + EMBEDDING].properties.dtype

    def problem(self, piece: ShardedTensor) -> str | None:
        """Why this piece cannot be read, if it cannot."""
        stored = self._keys.get(piece.key)
        if not isinstance(stored, TensorStorageMetadata):
            return f"{piece.key}: missing"
        shape = tuple(stored.size)
        # A vocabulary may be stored with more padding or less.
        padded = piece.allow_shape_mismatch and shape[0] >= piece.global_shape[0]
        if shape != piece.global_shape and not (padded and shape[1:] == piece.global_shape[1:]):
            return f"{piece.key}: shape {list(shape)}, expected {list(piece.global_shape)}"
        if stored.properties.dtype not in DTYPES:
            return f"{piece.key}: type {stored.properties.dtype} is not supported"
        return None

    def unexpected(self, keys: set[str]) -> list[str]:
        """Weights that are stored under other keys than these."""
        return sorted(
            key
            for key, stored in self._keys.items()
            if isinstance(stored, TensorStorageMetadata)
            and key not in keys
            and self._style.is_weight(key)
        )

    def read(self, piece: ShardedTensor) -> torch.Tensor:
        """In the stored type, and in the memory it was loaded into where it is stored whole."""
        shape = _with_prepended(piece)
        first = self._chunks(piece.key, piece.prepend_axis_num)[
            piece.global_offset[: piece.prepend_axis_num]
        ]
        overlaps = [(c, o) for c in first if (o := _overlap(c, piece.global_offset, shape))]
        found = sum(math.prod(part.stop - part.start for part in o) for _, o in overlaps)
        if found != math.prod(shape):
            raise CheckpointError(f"{self.path}: parts of {piece.key} are missing.")
        if len(overlaps) == 1:
            return self._load(piece.key, *overlaps[0]).view(piece.local_shape)
        out = torch.empty(shape, dtype=self.dtype(piece))
        for chunk, overlap in overlaps:
            place = tuple(
                slice(part.start - start, part.stop - start)
                for part, start in zip(overlap, piece.global_offset, strict=True)
            )
            out[place] = self._load(piece.key, chunk, overlap)
        return out.view(piece.local_shape)

    def _chunks(self, key: str, num_prepended: int) -> dict[Offsets, list[ChunkStorageMetadata]]:
        """By layer (and expert): scanning all of them for every read would be quadratic."""
        if key not in self._chunks_of:
            chunks = self._chunks_of[key] = defaultdict(list)
            for chunk in self._keys[key].chunks:
                chunks[tuple(chunk.offsets[:num_prepended])].append(chunk)
        return self._chunks_of[key]

    def _load(
        self, key: str, chunk: ChunkStorageMetadata, overlap: tuple[slice, ...]
    ) -> torch.Tensor:
        with loading_errors(self.path):
            info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            with (self.path / info.relative_path).open("rb") as file:
                part = self._reader._slice_file(file, info)
                tensor = torch.load(part, map_location="cpu", weights_only=True)
        return tensor[
            tuple(
                slice(part.start - start, part.stop - start)
                for part, start in zip(overlap, chunk.offsets, strict=True)
            )
        ]


def _unfinished(path: Path, marker: str) -> CheckpointError:
    """marker: `.metadata` or `metadata.json`, which are written after all data, in this order."""
    return CheckpointError(
        f"{path}: no finished Megatron checkpoint of the format torch_dist (no {marker} in it)."
    )


def _with_prepended(piece: ShardedTensor) -> tuple[int, ...]:
    return (1,) * piece.prepend_axis_num + tuple(piece.local_shape)


def _overlap(
    chunk: ChunkStorageMetadata, offset: Offsets, shape: Sequence[int]
) -> tuple[slice, ...] | None:
    """In the coordinates of the whole tensor."""
    starts = [max(*pair) for pair in zip(chunk.offsets, offset, strict=True)]
    stops = [
        min(o1 + s1, o2 + s2)
        for o1, s1, o2, s2 in zip(chunk.offsets, chunk.sizes, offset, shape, strict=True)
    ]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return None
    return tuple(slice(*pair) for pair in zip(starts, stops, strict=True))


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
        plans[0].items.extend(
            WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects
        )
        plans, self._metadata = create_default_global_save_plan(plans)
        self._plans = self._writer.prepare_global_plan(plans)

    def is_written(self, number: int) -> bool:
        return self._contents(number).is_file()

    def write_part(self, number: int) -> None:
        planner = _LazyPlanner(self._parts[number], self._objects)
        with _failed_writes_as_os_errors():
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
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._directory))
        # 0.16 asks for this file; 0.19 keeps its like elsewhere and still reads this one.
        torch.save(common, self._directory / "common.pt")
        for path in lists:
            path.unlink()

    def _contents(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.written"


@contextmanager
def _failed_writes_as_os_errors() -> Iterator[None]:
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
                data = TensorWriteData(
                    chunk, TensorProperties(dtype=source.dtype), torch.Size(piece.global_shape)
                )
                index = MetadataIndex(piece.key, chunk.offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    return items


def _row_chunks(piece: ShardedTensor) -> Iterator[slice]:
    rows = piece.data.shape[0]
    step = max(CHUNK_BYTES // max(piece.data[:1].nbytes, 1), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _chunk(piece: ShardedTensor, rows: slice) -> ChunkStorageMetadata:
    axis = piece.prepend_axis_num
    offsets, sizes = list(piece.global_offset), list(_with_prepended(piece))
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
