"""Hugging Face → Megatron distributed checkpoint, which loads at any TP, PP and EP.

The output also gets config.json and the tokenizer, so that its path can stand wherever a Hugging
Face directory can: in a run's `student.hf_path`, and in the way back. With a Root it lies one level
lower, as Megatron-LM's --load wants it.
"""

from functools import partial
from pathlib import Path

import torch

from megatron_eopd.conversion.megatron_lm import Root
from megatron_eopd.conversion.output import finish_output, open_output, write_parts
from megatron_eopd.conversion.skeleton import WHOLE, Group, Skeleton, make_skeleton
from megatron_eopd.errors import CheckpointError, ConfigError
from megatron_eopd.model_paths import is_hugging_face, is_mcore, resolve_checkpoint
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_files import HFCheckpoint, copy_side_files, fingerprint
from megatron_eopd.models.hf_weights import fill_shard
from megatron_eopd.models.mcore_writer import MCoreWriter, Source
from megatron_eopd.parallel.init import ParallelContext

PART_BYTES = 512 * 2**20
"""A file of the checkpoint, which is also what an interruption can cost."""


def to_mcore(
    hf_dir: Path,
    out: Path,
    dtype: torch.dtype | None,
    overwrite: bool,
    context: ParallelContext,
    root: Root | None = None,
) -> None:
    """Collective over all ranks, in a context in which nothing is cut.

    dtype: of the output; None keeps the checkpoint's, which must then be one.
    root: write Megatron-LM's layout; None: the checkpoint is `out` itself.

    Raises:
        ConfigError, CheckpointError: nothing named `out` is left behind.
    """
    refuse_megatron(hf_dir)
    hf_config = read_hf_config(hf_dir)
    skeleton = make_skeleton(hf_config, context)
    with HFCheckpoint(hf_dir) as checkpoint:
        check_source(checkpoint, skeleton)
        dtype = dtype or only_dtype(checkpoint, skeleton)
        read = partial(_read, checkpoint=checkpoint, skeleton=skeleton, dtype=dtype)
        sources = [
            Source(group.item, group.shape, dtype, partial(read, group))
            for group in skeleton.groups
        ]
        num_bytes = sum(source.num_bytes for source in sources)
        identity = {
            "source": [*checkpoint.fingerprint(), *fingerprint([hf_dir / "config.json"])],
            "dtype": str(dtype),
            "part": PART_BYTES,
            "below": root.name if root else "",
        }
        unfinished = open_output(
            out, hf_dir, overwrite, identity, num_bytes, context, below=identity["below"]
        )
        directory = unfinished / identity["below"]
        directory.mkdir(exist_ok=True)
        parts = fill_parts(sources)
        writer = MCoreWriter(directory, parts, skeleton.objects)
        write_parts(
            len(parts), writer.is_written, writer.write_part, unfinished, num_bytes, context
        )

    def last_files() -> None:
        copy_side_files(hf_dir, directory)
        if root is None:
            writer.finish({})
        else:
            writer.finish(root.common_state(hf_config, context.layout))
            root.write_tracker(unfinished)

    finish_output(unfinished, out, last_files, context)


def refuse_megatron(hf_dir: Path) -> None:
    """
    Raises:
        ConfigError: it is the other kind of directory. CheckpointError: and none that can be read.
    """
    if not is_hugging_face(hf_dir) and is_mcore(resolve_checkpoint(hf_dir)):
        raise ConfigError(
            f"{hf_dir}: is a Megatron checkpoint, where a Hugging Face directory belongs. The "
            f"other way is: python tools/convert_hf.py to-hf {hf_dir} OUT_DIR."
        )


def check_source(checkpoint: HFCheckpoint, skeleton: Skeleton) -> None:
    shapes = {name: shape for group in skeleton.groups for name, shape in group.hf_shapes.items()}
    tied = "lm_head.weight" not in shapes
    checkpoint.check(shapes, set(shapes), tied=tied)
    if tied:
        checkpoint.check_tied_head()


def only_dtype(checkpoint: HFCheckpoint, skeleton: Skeleton) -> torch.dtype:
    """The type that all weights have.

    Raises:
        CheckpointError: they have several.
    """
    counts = checkpoint.count_dtypes(name for group in skeleton.groups for name in group.hf_shapes)
    if len(counts) > 1:
        found = ", ".join(f"{count} × {dtype}" for dtype, count in counts.items())
        raise CheckpointError(
            f"{checkpoint.path}: tensors of several types: {found}. Choose one with --dtype."
        )
    return next(iter(counts))


def fill_parts(sources: list[Source]) -> list[list[Source]]:
    """Consecutive parameters, of at least PART_BYTES together, except for the last."""
    parts: list[list[Source]] = [[]]
    for source in sources:
        if sum(s.num_bytes for s in parts[-1]) >= PART_BYTES:
            parts.append([])
        parts[-1].append(source)
    return parts


def _read(
    group: Group, checkpoint: HFCheckpoint, skeleton: Skeleton, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty(group.shape, dtype=dtype)
    wholes = [checkpoint.slice(name) for name in group.hf_shapes]
    fill_shard(out, group.weight.row.split, wholes, *WHOLE, skeleton.heads)
    return out
