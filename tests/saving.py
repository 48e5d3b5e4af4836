"""One checkpoint, written as a run writes it."""

from collections.abc import Mapping
from pathlib import Path

from megatron_eopd.checkpoints.position import Position
from megatron_eopd.checkpoints.saver import Saver
from megatron_eopd.config.training import CheckpointConfig
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.training.optimizer import Trainable


def save(
    run_dir: Path,
    student: Trainable,
    position: Position,
    hf_path: Path,
    context: ParallelContext,
    texts: Mapping[str, str] | None = None,
    **options,
) -> Path:
    """Complete on return. `options`: of CheckpointConfig."""
    saver = Saver(run_dir, hf_path, CheckpointConfig(**options), context, print)
    directory = saver.save(student, position, texts)
    saver.finish()
    return directory
