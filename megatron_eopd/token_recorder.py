"""Signals of some responses of an iteration, onto the disk. In: Session, its rollouts. Out:
RUN_DIR/tokens/000120.npz, which view.py shows.

Every rank of the student calls all of it; rank 0 writes.
"""

from collections.abc import Sequence

from megatron_eopd.build import Session
from megatron_eopd.records import Rollout
from megatron_eopd.tokens.assemble import about, assemble, keep_record
from megatron_eopd.tokens.file import training_file
from megatron_eopd.tokens.notes import TokenNotes, choose
from megatron_eopd.tokens.record import TokenRecord


class TokenRecorder:
    """Of one iteration; of no responses where none is due."""

    def __init__(
        self, session: Session, iteration: int, rollouts: Sequence[Rollout], first_step: int
    ) -> None:
        """`first_step`: how many optimizer steps of the iteration an earlier start has taken. Their
        signals went with it, and are not recorded."""
        self._session, self._iteration = session, iteration
        options, size = session.config.logging, session.config.training.global_batch_size
        interval = options.record_tokens_interval
        chosen: list[Rollout] = []
        if interval and iteration % interval == 0 and not first_step:
            chosen = choose(rollouts, options.record_tokens_samples)
        numbers = {id(rollout): n for n, rollout in enumerate(rollouts)}
        self._steps = [numbers[id(rollout)] // size for rollout in chosen]
        self._rollouts = chosen
        self._notes = TokenNotes(chosen)

    def notes(self, step: int) -> TokenNotes | None:
        """For the loss of this optimizer step of the iteration, if it has any of the responses."""
        return self._notes if step in self._steps else None

    def finish_step(self, step: int) -> None:
        """Writes, once the last of the responses has been trained on. Collective where it does."""
        if step != max(self._steps, default=-1):
            return
        columns = self._notes.gather(self._session.context)
        if columns is None:
            return
        config, piece = self._session.config, self._session.tokenizer.piece

        def make() -> TokenRecord:
            described = about(config, "training", self._iteration, columns)
            return assemble(described, self._rollouts, columns, piece, steps=self._steps)

        path = training_file(config.run_dir, self._iteration)
        keep_record(path, make, self._session.log.line)
