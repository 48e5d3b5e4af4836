"""A Megatron distributed checkpoint on disk, tensor by tensor.

Megatron-Core itself loads and saves whole models, and runs what a foreign checkpoint has pickled.
So this file goes one level down, to torch.distributed.checkpoint, which defines the format
(`torch_dist`): `.metadata` says which file holds which piece of which tensor, and Megatron adds
`metadata.json` and `common.pt`. Keys and shapes still come from Megatron's own sharded_state_dict.
"""

import math
import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_eopd.errors import CheckpointError
from megatron_eopd.model_paths import resolve_checkpoint
from megatron_eopd.models.hf_files import fingerprint, listing
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
            self._metadata = read_metadata(path)
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

    def has(self, key: str) -> bool:
        return key in self._keys

    def problem(self, piece: ShardedTensor, vocab_size: int | None = None) -> str | None:
        """Why this piece cannot be read, if it cannot. `vocab_size`: rows that a vocabulary must
        have, where the model's has padding behind them."""
        stored = self._keys.get(piece.key)
        if not isinstance(stored, TensorStorageMetadata):
            return f"{piece.key}: missing"
        shape, expected = tuple(stored.size), list(piece.global_shape)
        # A vocabulary may be stored with more padding or less.
        if piece.allow_shape_mismatch and shape:
            expected[0] = max(vocab_size or expected[0], shape[0])
        if list(shape) != expected:
            return f"{piece.key}: shape {list(shape)}, expected {list(piece.global_shape)}"
        if stored.properties.dtype not in DTYPES:
            return f"{piece.key}: type {stored.properties.dtype} is not supported"
        return None

    def fill(self, pieces: Sequence[ShardedTensor], vocab_size: int) -> None:
        """Read each piece into its own data.

        Raises:
            CheckpointError: listing all that does not fit, before anything is read.
        """
        problems = [problem for p in pieces if (problem := self.problem(p, vocab_size))]
        if problems:
            raise CheckpointError(
                f"{self.path}: the tensors are those of another model:\n{listing(problems)}"
            )
        for piece in pieces:
            piece.data.copy_(self.read(piece))

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
        """In the stored type, and in the memory it was loaded into where it is stored whole. Rows
        of a vocabulary that are not stored are padding, and zero."""
        shape = stored_shape(piece)
        first = self._chunks(piece.key, piece.prepend_axis_num)[
            piece.global_offset[: piece.prepend_axis_num]
        ]
        overlaps = [(c, o) for c in first if (o := _overlap(c, piece.global_offset, shape))]
        found = sum(math.prod(part.stop - part.start for part in o) for _, o in overlaps)
        rows = min(shape[0], max(self._keys[piece.key].size[0] - piece.global_offset[0], 0))
        stored = rows * math.prod(shape[1:]) if piece.allow_shape_mismatch else math.prod(shape)
        if found != stored:
            raise CheckpointError(f"{self.path}: parts of {piece.key} are missing.")
        if len(overlaps) == 1 and found == math.prod(shape):
            return self._load(piece.key, *overlaps[0]).view(piece.local_shape)
        out = torch.zeros(shape, dtype=self.dtype(piece))
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

    def read_object(self, key: str) -> bytes:
        """As it was written."""
        with loading_errors(self.path):
            info = self._metadata.storage_data[MetadataIndex(key)]
            with (self.path / info.relative_path).open("rb") as file:
                return self._reader._slice_file(file, info).read()

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


class _Unpickler(pickle.Unpickler):
    """Makes what a `.metadata` is made of and nothing else: a pickle may call any function."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if self._is_known(module) else None
        is_record = is_dataclass(found) or (isinstance(found, type) and issubclass(found, Enum))
        if (is_record and found.__module__ == module) or isinstance(found, torch.dtype):
            return found
        if (module, name) in _DESCRIPTION_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no description needs")

    def _is_known(self, module: str) -> bool:
        return module == "torch" or module in _DESCRIPTION_MODULES


# torch's, and Megatron-Core's additions in checkpoints of its own.
_DESCRIPTION_MODULES = (
    *(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner")),
    "megatron.core.dist_checkpointing.strategies.torch",
)
_DESCRIPTION_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
}


def read_metadata(path: Path) -> Metadata:
    """
    Raises:
        pickle.UnpicklingError, and nearly anything else over a damaged file.
    """
    with (path / ".metadata").open("rb") as file:
        return _Unpickler(file).load()


def _unfinished(path: Path, marker: str) -> CheckpointError:
    """marker: `.metadata` or `metadata.json`, which are written after all data, in this order."""
    return CheckpointError(
        f"{path}: no finished Megatron checkpoint of the format torch_dist (no {marker} in it)."
    )


def stored_shape(piece: ShardedTensor) -> tuple[int, ...]:
    """With the axes of layer and expert, of which it is one."""
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
