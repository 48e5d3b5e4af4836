"""Signals of some responses of a task, taken down while they are measured. In: rollouts of the
first problems. Out: TASK.tokens.npz, which view.py shows.

Every rank of the student calls all of it; rank 0 writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_eopd.config import Config
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.evaluation.recorder import Recorder
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import Rollout
from megatron_eopd.tokens.assemble import about, assemble, keep_record
from megatron_eopd.tokens.file import evaluation_file
from megatron_eopd.tokens.notes import TokenNotes, choose
from megatron_eopd.tokens.record import TokenRecord


@dataclass
class TokenKeeper:
    """Of one task of an evaluation."""

    task: str
    directory: Path
    iteration: int
    config: Config
    tokenizer: Tokenizer
    context: ParallelContext
    tell: Callable[[str], None]
    _rollouts: list[Rollout] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return evaluation_file(self.directory, self.task)

    @property
    def count(self) -> int:
        """Responses that are to be recorded."""
        options = self.config.logging
        return options.record_tokens_samples if options.record_tokens_interval else 0

    def notes(self, rollouts: Sequence[Rollout]) -> TokenNotes | None:
        """Of the first rollouts of the task."""
        self._rollouts = choose(rollouts, self.count)
        return TokenNotes(self._rollouts) if self._rollouts else None

    def keep(self, notes: TokenNotes, recorder: Recorder | None) -> None:
        """`recorder`: of rank 0, which knows the verdicts."""
        columns = notes.gather(self.context)
        if columns is None:
            return

        def make() -> TokenRecord:
            samples = [recorder.file.read(r.prompt.index)[r.sample_index] for r in self._rollouts]
            return assemble(
                about(self.config, "evaluation", self.iteration, columns, self.task),
                self._rollouts,
                columns,
                self.tokenizer.piece,
                steps=[0] * len(samples),
                verdicts=[sample.verdict for sample in samples],
            )

        keep_record(self.path, make, self.tell)
