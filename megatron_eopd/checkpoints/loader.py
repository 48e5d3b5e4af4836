"""Fill a student from a checkpoint of any layout. In: its directory. Out: Position.

Each rank reads the pieces that it has, and needs no other rank for it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_eopd.checkpoints.contents import (
    MASTER,
    Item,
    items_of,
    optimizer_key,
    optimizer_pieces,
    restore_rng,
    rng_key,
    set_adam_step,
)
from megatron_eopd.checkpoints.files import problems_of, read_sums
from megatron_eopd.checkpoints.position import Position, read_position, sizes_of
from megatron_eopd.errors import CheckpointError
from megatron_eopd.models.load import read_weights
from megatron_eopd.models.mcore_files import MCoreCheckpoint, loading_errors, pieces_of
from megatron_eopd.parallel.collectives import collecting, gather_everywhere, raise_together
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.training.optimizer import Trainable


def verify(directory: Path, context: ParallelContext) -> list[str]:
    """What is wrong with the content of its files, on every rank. Collective: each rank reads a
    part of them."""
    try:
        sums = read_sums(directory) or {}
    except (CheckpointError, OSError) as error:
        sums, unread = {}, [str(error)]
    else:
        unread = []
    names = sorted(sums, key=lambda name: (-sums[name].num_bytes, name))
    own = names[context.layout.rank :: context.layout.world_size]
    found = unread + problems_of(directory, {name: sums[name] for name in own}, own)
    every = gather_everywhere(found, context.cpu_group)
    return sorted({problem for problems in every for problem in problems})


def load(
    directory: Path, student: Trainable, vocab_size: int, context: ParallelContext
) -> Position:
    """Fill student and optimizer. Collective. `vocab_size`: of the model, without padding.

    Raises:
        CheckpointError, RemoteError: missing, unfinished, damaged, or of another model.
    """
    # Adam has no moments before its first step. A step on zero gradients makes them; all that it
    # touches is overwritten below.
    for chunk in student.wrapped:
        chunk.zero_grad_buffer()
    student.optimizer.step()
    errors: list[Exception] = []
    with collecting(errors):
        position = read_position(directory)
        checkpoint = MCoreCheckpoint(directory)
        read_weights(student.chunks, checkpoint, vocab_size)
        _read_optimizer(student, checkpoint, vocab_size)
        set_adam_step(student, _adam_step(position, directory))
        if position.format > 1 and position.layout == sizes_of(context):
            key = rng_key(context.layout.rank, context.layout.world_size)
            restore_rng(checkpoint.read_object(key))
    raise_together(errors, context.cpu_group)
    return position


def _read_optimizer(student: Trainable, checkpoint: MCoreCheckpoint, vocab_size: int) -> None:
    pieces = []
    for item in items_of(student):
        if item.is_optimized:
            pieces += _exact_weights(item, checkpoint)
            pieces += [_or_weight(piece, checkpoint) for piece in optimizer_pieces(item)]
    checkpoint.fill(pieces, vocab_size)


def _exact_weights(item: Item, checkpoint: MCoreCheckpoint) -> Iterator[ShardedTensor]:
    """A float32 parameter is its own master; of a bfloat16 run's it takes the master's place."""
    if item.tensor.dtype == torch.float32:
        for piece in pieces_of(item.sharded, item.tensor.detach()):
            master = replace(piece, key=optimizer_key(MASTER, piece.key))
            if checkpoint.has(master.key):
                yield master


def _or_weight(piece: ShardedTensor, checkpoint: MCoreCheckpoint) -> ShardedTensor:
    """A float32 run has no masters beside its weights."""
    weight = piece.key.removeprefix(optimizer_key(MASTER, ""))
    return piece if checkpoint.has(piece.key) else replace(piece, key=weight)


def _adam_step(position: Position, directory: Path) -> float:
    if position.adam_step is not None:
        return position.adam_step
    with loading_errors(directory):  # format 1 has it in each group of Megatron-Core's own state
        common = torch.load(directory / "common.pt", weights_only=True)
    state = common["optimizer"]
    groups = (state if "optimizer" in state else state[0])["optimizer"]["param_groups"]
    return groups[0]["step"]
