"""Rollouts on disk, one jsonl file per iteration: to be read by a person, and to be replayed.

A replayed batch lets two layouts be compared on the same samples, and turns a report of a bad step
into a test. A file may have been made by other tools or other models, so every line is checked
against the run that reads it.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import DEFAULT_TEACHER, Rollout

STATE_FILE = "state.json"
"""Stands beside the one batch of a step that went wrong: the batch is replayed in every iteration,
because a run that looks into it starts where it has weights."""

LARGEST_LOGPROB = 1e-3
"""A log-probability is at most 0, but for the rounding of the engine that made it."""


@dataclass(frozen=True)
class _Line(Rollout):
    # Strict: "7" is no token id, and neither is true or 7.0.
    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    response_text: str = ""
    """For the reader; ids are the data."""


_LINE = TypeAdapter(_Line)


def rollout_file(directory: Path, iteration: int) -> Path:
    return directory / f"{iteration:06d}.jsonl"


def write_rollouts(path: Path, rollouts: Sequence[Rollout], tokenizer: Tokenizer) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w") as file:
        file.writelines(rollout_lines(rollouts, tokenizer))
    os.replace(unfinished, path)


def rollout_lines(rollouts: Sequence[Rollout], tokenizer: Tokenizer) -> Iterator[str]:
    for rollout in rollouts:
        row = {"response_text": tokenizer.decode(rollout.response_ids)}
        yield json.dumps(row | dataclasses.asdict(rollout)) + "\n"


@dataclass(frozen=True)
class Recording:
    """A folder of recorded rollouts, and what the run that replays it can train on."""

    directory: Path
    num_rollouts: int
    """Of every iteration: rollout.batch_size."""
    vocab_size: int
    """Tokens that student and teachers share."""
    max_length: int
    """Most tokens of prompt and response together."""
    teachers: Sequence[str] = (DEFAULT_TEACHER,)
    """Names that a prompt may give."""
    shown_more: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Those of them that read another prompt than the student → the number of their tokens."""
    refuses_references: str = ""
    """The option that needs tokens which the student sampled; empty without one."""

    def check_files(self, iterations: range) -> None:
        """
        Raises:
            ConfigError: a file is missing, or the first one cannot be replayed.
        """
        missing = [n for n in iterations if not self._file(n).is_file()]
        if missing:
            raise ConfigError(
                f"{rollout_file(self.directory, missing[0])}: no recorded rollouts for iteration "
                f"{missing[0]}, and {len(missing)} of the {len(iterations)} files from "
                f"{iterations[0]:06d}.jsonl to {iterations[-1]:06d}.jsonl are missing. Record them "
                f"with rollout.record=true, or set training.train_iters={missing[0]}."
            )
        if iterations:
            self.read(iterations[0])

    def read(self, iteration: int) -> list[Rollout]:
        """
        Raises:
            ConfigError: the file is missing, or holds another number of rollouts; or a line of it
                is no rollout of this run (which one, and why).
        """
        path = self._file(iteration)
        if not path.is_file():
            raise ConfigError(
                f"{path}: no recorded rollouts for this iteration. Record them with "
                f"rollout.record=true, or lower training.train_iters."
            )
        rollouts = [self._checked(where, rollout) for where, rollout in read_rollouts(path)]
        if len(rollouts) != self.num_rollouts:
            raise ConfigError(
                f"{path} holds {len(rollouts)} rollouts. Set rollout.batch_size={len(rollouts)} "
                f"(it is {self.num_rollouts})."
            )
        return rollouts

    def _file(self, iteration: int) -> Path:
        if (self.directory / STATE_FILE).is_file():
            return next(self.directory.glob("*.jsonl"), rollout_file(self.directory, iteration))
        return rollout_file(self.directory, iteration)

    def _checked(self, where: str, rollout: Rollout) -> Rollout:
        for fault in self._faults(rollout):
            raise ConfigError(f"{where}: {fault}")
        return rollout

    def _faults(self, rollout: Rollout) -> Iterator[str]:
        prompt, logprobs = rollout.prompt, rollout.response_logprobs
        parts = {"prompt_ids": prompt.prompt_ids, "response_ids": rollout.response_ids}
        for name, ids in parts.items():
            yield from self._faults_of_ids(name, ids, "student", self.vocab_size)
        for name, ids in prompt.teacher_ids.items():
            if name not in self.shown_more:
                yield (
                    f"a prompt of the teacher {name!r}, which by the options reads the student's. "
                    f"Set data.teacher_prompt_key, data.teacher_prompt_template or the teacher's "
                    f"prompt.* as they were when it was recorded."
                )
            size = self.shown_more.get(name, 0)
            yield from self._faults_of_ids(f"teacher_ids.{name}", ids, name, size)
        if len(logprobs) != len(rollout.response_ids):
            yield (
                f"{len(logprobs)} response_logprobs for {len(rollout.response_ids)} response_ids; "
                f"there must be one for each."
            )
        too_large = [x for x in logprobs if x > LARGEST_LOGPROB]
        if too_large:
            yield f"response_logprobs has {too_large[0]:g}; a log-probability is at most 0."
        read = max(map(len, (prompt.prompt_ids, *prompt.teacher_ids.values())))
        length = read + len(rollout.response_ids)
        if length > self.max_length:
            yield (
                f"{length} tokens, and at most {self.max_length} fit: the smallest of the models' "
                f"max_position_embeddings and training.max_tokens_per_microbatch."
            )
        if prompt.teacher not in self.teachers:
            yield (
                f"the prompt's teacher is {prompt.teacher!r}, and this run has "
                f"{', '.join(self.teachers)}. Name it in [teachers], or change the line."
            )
        lacking = [
            n for n in self.shown_more if prompt.is_scored_by(n) and n not in prompt.teacher_ids
        ]
        if lacking:
            yield (
                f"no prompt in it of the teacher {lacking[0]!r}, which by the options reads "
                f"another one than the student. Record with these options, or leave out "
                f"data.teacher_prompt_key, data.teacher_prompt_template and the teacher's prompt.*."
            )
        if rollout.source == "reference" and self.refuses_references:
            yield (
                f"a reference answer, and {self.refuses_references} needs tokens that the student "
                f"sampled. Set objective.reverse_kl=full."
            )

    def _faults_of_ids(
        self, name: str, ids: Sequence[int], who: str, vocab_size: int
    ) -> Iterator[str]:
        if not ids:
            yield f"{name} is empty."
        outside = [i for i in ids if not 0 <= i < vocab_size]
        if outside:
            yield (
                f"{name} has the token {outside[0]}, and the {who}'s vocabulary is 0 to "
                f"{vocab_size - 1}. Replay what a model with the same tokenizer wrote."
            )


def read_rollouts(path: Path) -> Iterator[tuple[str, Rollout]]:
    """(file and line, rollout) of every line that is not blank.

    Raises:
        ConfigError: a line is no rollout (which one, and its first fault).
    """
    # Bytes: as text, a line would also end at the U+2028 that may stand inside a JSON string.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield where, _rollout(where, line)


def _rollout(where: str, line: bytes) -> Rollout:
    try:
        row = _LINE.validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        if at and first["type"] != "missing":
            at += f" is {first['input']!r:.80}"
        reason = f"{at}: {first['msg']}" if at else first["msg"]
        raise ConfigError(f"{where}: not a recorded rollout: {reason}.") from None
    return Rollout(**{f.name: getattr(row, f.name) for f in dataclasses.fields(Rollout)})
