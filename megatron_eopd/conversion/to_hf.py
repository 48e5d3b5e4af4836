"""Megatron distributed checkpoint of any layout → Hugging Face directory.

In: a converted checkpoint, one of a run, or one of Megatron-LM. Out: sharded safetensors with
index, config.json and tokenizer, ready for transformers and vLLM.
"""

from pathlib import Path

import torch

from megatron_eopd.conversion.output import finish_output, open_output, write_parts
from megatron_eopd.conversion.skeleton import Group, Skeleton, make_skeleton
from megatron_eopd.errors import CheckpointError, ConfigError
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_files import (
    PlannedFile,
    SafetensorsWriter,
    copy_side_files,
    fingerprint,
    listing,
    name_files,
    plan_files,
    write_index_and_config,
)
from megatron_eopd.models.hf_weights import join
from megatron_eopd.models.mcore_files import MCoreCheckpoint, pieces_of
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.weight_sync.manifest import TensorSpec


def to_hf(
    mcore_dir: Path,
    out: Path,
    hf_config_dir: Path | None,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    overwrite: bool,
    context: ParallelContext,
) -> None:
    """Collective over all ranks, in a context in which nothing is cut.

    hf_config_dir: where config.json and the tokenizer are; None: in mcore_dir.
    dtype: of the output; None keeps the checkpoint's.

    Raises:
        ConfigError, CheckpointError: nothing named `out` is left behind.
    """
    side_files = hf_config_dir or config_dir_of(mcore_dir)
    skeleton = make_skeleton(read_hf_config(side_files), context)
    checkpoint = MCoreCheckpoint(mcore_dir)
    check_stored(checkpoint, skeleton)
    planned = [_specs(group, checkpoint, dtype) for group in skeleton.groups]
    files = name_files(plan_files(planned, max_shard_bytes))
    identity = {
        # Heads of another size make other tensors of the same shapes, so config.json counts.
        "source": [*checkpoint.fingerprint(), *fingerprint([side_files / "config.json"])],
        "files": [[file.name, file.num_bytes, str(file.specs[0].dtype)] for file in files],
    }
    num_bytes = sum(file.num_bytes for file in files)
    directory = open_output(out, mcore_dir, overwrite, identity, num_bytes, context)
    group_of = {name: group for group in skeleton.groups for name in group.hf_shapes}

    def is_written(number: int) -> bool:
        # A file has its name only when it is complete.
        return (directory / files[number].name).is_file()

    def write(number: int) -> None:
        _write_file(directory, files[number], group_of, checkpoint, skeleton)

    write_parts(len(files), is_written, write, directory, num_bytes, context)

    def last_files() -> None:
        copy_side_files(side_files, directory)
        write_index_and_config(directory, files)

    finish_output(directory, out, last_files, context)


def config_dir_of(mcore_dir: Path) -> Path:
    if not mcore_dir.is_dir():
        raise ConfigError(f"{mcore_dir}: no such directory.")
    if not (mcore_dir / "config.json").is_file():
        raise ConfigError(
            f"{mcore_dir}: no config.json beside the weights. Give the directory that has it (and "
            f"the tokenizer) with --hf-config."
        )
    return mcore_dir


def check_stored(checkpoint: MCoreCheckpoint, skeleton: Skeleton) -> None:
    """
    Raises:
        CheckpointError: listing every weight that is missing, unexpected or of another shape.
    """
    pieces = [
        piece
        for group in skeleton.groups
        for piece in pieces_of(group.item, torch.empty(group.shape, device="meta"))
    ]
    problems = [problem for piece in pieces if (problem := checkpoint.problem(piece))]
    unexpected = checkpoint.unexpected({piece.key for piece in pieces})
    problems += [f"{key}: unexpected, the model has no such weight" for key in unexpected]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: the weights do not fit config.json:\n{listing(problems)}"
        )


def read_group(group: Group, checkpoint: MCoreCheckpoint, skeleton: Skeleton) -> list[torch.Tensor]:
    """The whole HF tensors of a parameter, in the order of its names."""
    pieces = pieces_of(group.item, torch.empty(group.shape, device="meta"))
    if len(pieces) == 1:
        parameter = checkpoint.read(pieces[0])
    else:
        dtype = checkpoint.dtype(pieces[0].key)
        parameter = torch.empty(group.shape, dtype=dtype)
        for piece in pieces_of(group.item, parameter):
            piece.data.copy_(checkpoint.read(piece))
    return join(group.weight.row.split, [parameter], skeleton.heads, skeleton.vocab_size)


def _specs(
    group: Group, checkpoint: MCoreCheckpoint, dtype: torch.dtype | None
) -> list[TensorSpec]:
    first = pieces_of(group.item, torch.empty(group.shape, device="meta"))[0]
    kept = str(dtype or checkpoint.dtype(first.key)).removeprefix("torch.")
    return [TensorSpec(name, kept, shape) for name, shape in group.hf_shapes.items()]


def _write_file(
    directory: Path,
    planned: PlannedFile,
    group_of: dict[str, Group],
    checkpoint: MCoreCheckpoint,
    skeleton: Skeleton,
) -> None:
    with SafetensorsWriter(directory, planned) as writer:
        groups = {group.name: group for group in (group_of[s.name] for s in planned.specs)}
        for group in groups.values():
            for tensor in read_group(group, checkpoint, skeleton):
                writer.write(tensor)
