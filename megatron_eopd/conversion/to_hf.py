"""Megatron distributed checkpoint of any layout → Hugging Face directory.

In: a converted checkpoint, one of a run, or one of Megatron-LM. Out: sharded safetensors with
index, config.json and tokenizer, ready for transformers and vLLM.
"""

from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_eopd.conversion.output import finish_output, open_output, write_parts
from megatron_eopd.conversion.skeleton import Group, Skeleton, make_skeleton
from megatron_eopd.errors import CheckpointError, ConfigError
from megatron_eopd.model_paths import config_dir_of, is_hugging_face, is_mcore
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

    mcore_dir: a checkpoint, or the root whose tracker names one.
    hf_config_dir: where config.json and the tokenizer are; None: in the checkpoint or its root.
    dtype: of the output; None keeps the checkpoint's.

    Raises:
        ConfigError, CheckpointError: nothing named `out` is left behind.
    """
    refuse_hugging_face(mcore_dir)
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


def refuse_hugging_face(mcore_dir: Path) -> None:
    """
    Raises:
        ConfigError: it is the other kind of directory.
    """
    if is_hugging_face(mcore_dir) and not is_mcore(mcore_dir):
        raise ConfigError(
            f"{mcore_dir}: is a Hugging Face directory, where a Megatron checkpoint belongs. The "
            f"other way is: python tools/convert_hf.py to-mcore {mcore_dir} OUT_DIR."
        )


def check_stored(checkpoint: MCoreCheckpoint, skeleton: Skeleton) -> None:
    """
    Raises:
        CheckpointError: listing every weight that is missing, unexpected or of another shape.
    """
    pieces = [piece for group in skeleton.groups for piece in _pieces(group, checkpoint)]
    problems = [problem for piece in pieces if (problem := checkpoint.problem(piece))]
    unexpected = checkpoint.unexpected({piece.key for piece in pieces})
    problems += [f"{key}: unexpected, the model has no such weight" for key in unexpected]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: the weights do not fit config.json:\n{listing(problems)}"
        )


def read_group(group: Group, checkpoint: MCoreCheckpoint, skeleton: Skeleton) -> list[torch.Tensor]:
    """The whole HF tensors of a parameter, in the order of its names."""
    pieces = _pieces(group, checkpoint)
    if len(pieces) == 1:
        parameter = checkpoint.read(pieces[0])
    else:
        parameter = torch.empty(group.shape, dtype=checkpoint.dtype(pieces[0]))
        for piece in _pieces(group, checkpoint, parameter):
            piece.data.copy_(checkpoint.read(piece))
    return join(group.weight.row.split, [parameter], skeleton.heads, skeleton.vocab_size)


def _pieces(
    group: Group, checkpoint: MCoreCheckpoint, parameter: torch.Tensor | None = None
) -> list[ShardedTensor]:
    """How this checkpoint addresses a parameter, as views of it where it is given."""
    if parameter is None:
        parameter = torch.empty(group.shape, device="meta")
    return pieces_of(checkpoint.stored_as(group.item), parameter)


def _specs(
    group: Group, checkpoint: MCoreCheckpoint, dtype: torch.dtype | None
) -> list[TensorSpec]:
    first = _pieces(group, checkpoint)[0]
    kept = str(dtype or checkpoint.dtype(first)).removeprefix("torch.")
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
