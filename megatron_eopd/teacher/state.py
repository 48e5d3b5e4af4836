"""What a checkpoint holds of teachers that follow the student. In: their models. Out: pieces of
tensors, views of their memory, under keys of their own."""

from collections.abc import Iterator
from dataclasses import replace

from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from megatron_eopd.errors import CheckpointError
from megatron_eopd.models.mcore_files import MCoreCheckpoint, pieces_of
from megatron_eopd.models.mcore_keys import OF_TEACHERS
from megatron_eopd.teacher.model import TeacherModel


def pieces_to_write(name: str, model: TeacherModel) -> Iterator[ShardedTensor]:
    """Of all ranks together every element once."""
    yield from (piece for piece in all_pieces(name, model) if not any(piece.replica_id))


def all_pieces(name: str, model: TeacherModel) -> Iterator[ShardedTensor]:
    """All that this rank has; nothing of a frozen teacher."""
    if model.follower is None:
        return
    # Megatron-Core would take the student's.
    groups = {"dp_cp_group": model.context.groups.dp_cp}
    for number, weights in enumerate(model.follower.tensors()):
        parameters = (p for chunk in model.chunks for p in chunk.parameters())
        weight_of = dict(zip(parameters, weights, strict=True))
        for chunk in model.chunks:
            for sharded in chunk.sharded_state_dict(metadata=groups).values():
                if isinstance(sharded, ShardedObject):
                    continue
                for piece in pieces_of(sharded, weight_of[sharded.data]):
                    key = f"{OF_TEACHERS}{name}.{number}.{piece.key}"
                    yield replace(piece, key=key, dtype=piece.data.dtype)


def read_state(
    name: str, model: TeacherModel, checkpoint: MCoreCheckpoint, vocab_size: int
) -> None:
    """Fill it. `vocab_size`: of the model, without padding.

    Raises:
        CheckpointError: the checkpoint holds none, or that of another model.
    """
    pieces = list(all_pieces(name, model))
    missing = [piece.key for piece in pieces if not checkpoint.has(piece.key)]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: holds nothing of the teacher {name!r} that follows the student "
            f"({len(missing)} of {len(pieces)} tensors are missing, the first is {missing[0]}). It "
            f"was written by a run without such a teacher. To begin with its weights, use another "
            f"run_dir and student.hf_path={checkpoint.path}; to evaluate them, set teacher=none, "
            f"or a teacher that does not follow."
        )
    checkpoint.fill(pieces, vocab_size)
