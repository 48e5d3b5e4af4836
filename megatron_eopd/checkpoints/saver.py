"""Writes checkpoints, beside the training where there is room. In: student, Position. Out: files.

A save has two halves. The first holds up the run: what this rank has to write is copied into host
memory. The second writes it, on a thread with a process group of its own, while the run goes on:
tensors, their sums, and when all ranks have done so the description and DONE, by rank 0. Without
room for the copy the run waits for both.

The format is Megatron-Core's torch_dist, readable under any parallel layout; see contents.py.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_eopd.checkpoints import files
from megatron_eopd.checkpoints.contents import adam_step
from megatron_eopd.checkpoints.position import Position, best_of
from megatron_eopd.checkpoints.writing import (
    Writing,
    begin_directory,
    part_of_rank,
    saving_errors,
    unfinished,
)
from megatron_eopd.config import CheckpointConfig
from megatron_eopd.errors import (
    CheckpointError,
    EngineError,
    ExpectedError,
    Interrupted,
    NonFiniteError,
    RemoteError,
    ReplicaError,
    SpikeError,
)
from megatron_eopd.parallel.collectives import (
    collecting,
    gather_everywhere,
    raise_together,
)
from megatron_eopd.parallel.init import ParallelContext, another_cpu_group
from megatron_eopd.training.optimizer import Trainable

EVERYBODYS = (NonFiniteError, SpikeError, ReplicaError, EngineError, RemoteError, Interrupted)
"""Errors that are raised on every rank."""
ALONE_S = 10.0
"""How long a rank waits for its writing with any other error."""


class Saver:
    """The checkpoints of one run. One save is under way at most."""

    def __init__(
        self,
        run_dir: Path,
        hf_path: Path,
        options: CheckpointConfig,
        context: ParallelContext,
        tell: Callable[[str], None],
    ) -> None:
        """hf_path: where config.json and the tokenizer are; they are copied, so that a checkpoint
        can be converted, or another run start from its weights, without anything beside it.
        Collective."""
        self._run_dir, self._hf_path, self._options = run_dir, hf_path, options
        self._context, self._tell = context, tell
        self._group = another_cpu_group(options.save_timeout_minutes)
        self._running: Writing | None = None
        self._last: Writing | None = None
        self._staging: list[torch.Tensor] = []

    def save(
        self,
        student: Trainable,
        position: Position,
        texts: Mapping[str, str] | None = None,
        more: Iterable[ShardedTensor] = (),
    ) -> Path:
        """Returns when the run may change the student. Collective.

        `texts`: files to be written beside, name → content; `more`: what this rank writes of other
        models.

        Raises:
            CheckpointError: this one or the one before could not be written.
        """
        begin = monotonic()
        self.finish()
        directory = files.checkpoint_dir(self._run_dir, position.iteration, position.steps_done)
        position = replace(position, adam_step=adam_step(student))
        errors: list[Exception] = []
        with saving_errors(directory):
            with collecting(errors):
                own = part_of_rank(student, more, self._context)
                if self._context.layout.rank == 0:
                    begin_directory(unfinished(directory), self._hf_path, position, texts or {})
            raise_together(errors, self._context.cpu_group)
        writing = Writing(directory, own, self._context, self._group, self._completed, begin)
        self._last = writing
        largest = max(gather_everywhere(own.num_bytes, self._context.cpu_group))
        if self._options.async_save and largest <= self._options.staging_gib * 2**30:
            if all(gather_everywhere(own.stage(self._staging), self._context.cpu_group)):
                self._running = writing
                writing.start()
                return directory
            self._tell(
                f"WARNING: no memory for a copy of {largest / 2**30:.3g} GiB a rank, so the run "
                f"waits for each save. Lower checkpoint.staging_gib to plan for that."
            )
        writing.write()
        return directory

    @property
    def whole_save_s(self) -> float | None:
        """Seconds from the last save's beginning until it counted, as if the run had waited for
        it; None while it is under way."""
        return None if self._last is None else self._last.whole_s

    def poll(self) -> None:
        """Once an iteration: hear of a save that has failed before the next one is due. Collective.

        Raises:
            CheckpointError: on every rank.
        """
        if self._running is not None and all(
            gather_everywhere(self._running.is_over, self._context.cpu_group)
        ):
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is under way. On every rank, or none.

        Raises:
            CheckpointError: it could not be written, or not in time.
        """
        running, self._running = self._running, None
        if running is None:
            return
        minutes = self._options.save_timeout_minutes
        in_time = running.wait(minutes)
        # One rank may have waited long enough a moment before the others.
        if not all(gather_everywhere(in_time, self._context.cpu_group)):
            raise CheckpointError(
                f"{running.directory}: not written within checkpoint.save_timeout_minutes="
                f"{minutes:g}. Set a longer time, or look at what the disk is doing."
            )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """The run has ended, and only its own error counts. What is under way is finished if all
        ranks have that error; of one that is lost, the others would wait for long."""
        if error is None:
            self.finish()
        running, self._running = self._running, None
        if running is not None:
            self._tell("the run ends; finishing the save that is under way")
            is_everybodys = isinstance(error, EVERYBODYS)
            minutes = self._options.save_timeout_minutes if is_everybodys else ALONE_S / 60
            with suppress(ExpectedError):
                if not running.wait(minutes):
                    self._tell(f"{running.directory}: not written within {60 * minutes:g} s")

    def _completed(self, directory: Path, seconds: float) -> None:
        """By rank 0. Says so, and removes what need not be kept."""
        self._tell(f"saved {directory} in {seconds:.1f} s")
        best = best_of(files.complete(self._run_dir), self._options.keep_best)
        for old in files.to_remove(self._run_dir, self._options.keep_last, best):
            shutil.rmtree(old, ignore_errors=True)
