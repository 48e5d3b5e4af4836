"""All teachers of a run. In: an optimizer step's plan. Out: its microbatches, with their signals.

Each prompt names its teacher; a teacher sees only its own rollouts. What they hand over is joined
in the microbatch, so the loss never knows how many there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_eopd.data.packing import PackedRollouts, make_microbatches
from megatron_eopd.models.mcore_files import MCoreCheckpoint
from megatron_eopd.parallel.collectives import collecting, raise_together
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import MicroBatch, Payload, ScoredRollout, TeacherSignal
from megatron_eopd.run_log import StageTimes
from megatron_eopd.teacher.assignment import Item, as_read, items_of
from megatron_eopd.teacher.colocated import ColocatedTeacher
from megatron_eopd.teacher.following import Followed
from megatron_eopd.teacher.state import pieces_to_write, read_state


class Teacher(Protocol):
    """One teacher, wherever it sits."""

    head_VH: torch.Tensor | None
    """Its LM head with the student's cut, on the student's last stage, where its payload is hidden
    states."""

    def score(self, rounds: Sequence[Mapping[int, Item]]) -> Iterator[dict[int, Payload]]:
        """For each round, payloads of the items that are this rank's in the student's plan."""
        ...


class TeacherPool:
    def __init__(self, teachers: Mapping[str, Teacher], context: ParallelContext) -> None:
        self._teachers = teachers
        self._context = context
        self.heads: dict[str, torch.Tensor] = {}
        """Of those that hand over hidden states, on the student's last stage."""
        self._collect_heads()

    def _collect_heads(self) -> None:
        found = {name: teacher.head_VH for name, teacher in self._teachers.items()}
        self.heads |= {name: head_VH for name, head_VH in found.items() if head_VH is not None}

    @contextmanager
    def following(self, student: Followed, steps: int) -> Iterator[None]:
        """Around an update of the student, the `steps`-th of the run. Collective over the student's
        ranks."""
        with ExitStack() as stack:
            for _, teacher in self._colocated():
                stack.enter_context(teacher.following(student, steps))
            yield
        self._collect_heads()

    def pieces_to_write(self) -> Iterator[ShardedTensor]:
        """What this rank has of teachers that follow the student, for a checkpoint."""
        for name, teacher in self._colocated():
            yield from pieces_to_write(name, teacher.model)

    def read(self, checkpoint: MCoreCheckpoint, vocab_size: int) -> None:
        """Go on with those of a checkpoint. Collective over the student's ranks.

        Raises:
            CheckpointError: as read_state; on every rank.
        """
        errors: list[Exception] = []
        with collecting(errors):
            for name, teacher in self._colocated():
                read_state(name, teacher.model, checkpoint, vocab_size)
        raise_together(errors, self._context.cpu_group)
        for _, teacher in self._colocated():
            teacher.take_new_weights()
        self._collect_heads()

    def _colocated(self) -> list[tuple[str, ColocatedTeacher]]:
        """Those that may follow the student."""
        return [(n, t) for n, t in self._teachers.items() if isinstance(t, ColocatedTeacher)]

    def microbatches(
        self, rounds: Sequence[PackedRollouts], times: StageTimes | None = None
    ) -> Iterator[list[MicroBatch]]:
        """Of this rank, round by round. Collective over all ranks of student and teachers.

        Teachers on ranks of their own know of all rounds at once and work ahead. `times`: where
        each of several teachers is a stage of its own.
        """
        by_round = [dict(enumerate(items_of(packed))) for packed in rounds]
        streams = {
            name: teacher.score([_of_teacher(items, name) for items in by_round])
            for name, teacher in self._teachers.items()
        }
        for packed in rounds:
            # No name for it here: a generator would hold on to all payloads while it waits.
            yield self._assemble(packed, _next_of_each(streams, times))

    def _assemble(
        self, packed: PackedRollouts, signals: Mapping[int, Sequence[TeacherSignal]]
    ) -> list[MicroBatch]:
        """`signals`: of each item, by its number."""
        layout, device = self._context.layout, self._context.device
        # Items are numbered through all data-parallel ranks: see items_of.
        number = sum(len(batch) for rank in packed[: layout.dp_rank] for batch in rank)
        batches = []
        for rollouts in packed[layout.dp_rank]:
            scored = []
            for rollout in rollouts:
                scored.append(ScoredRollout(rollout, tuple(signals.get(number, ()))))
                number += 1
            batches.append(scored)
        return make_microbatches(batches, layout, device)


def _next_of_each(
    streams: Mapping[str, Iterator[dict[int, Payload]]], times: StageTimes | None
) -> dict[int, list[TeacherSignal]]:
    found: dict[int, list[TeacherSignal]] = {}
    for name, stream in streams.items():
        is_timed = times is not None and len(streams) > 1
        with times(f"score_{name}") if is_timed else nullcontext():
            payloads = next(stream)
        for number, payload in payloads.items():
            found.setdefault(number, []).append(TeacherSignal(name, payload))
    return found


def _of_teacher(items: Mapping[int, Item], name: str) -> dict[int, Item]:
    own = {n: item for n, item in items.items() if item.rollout.prompt.is_scored_by(name)}
    return as_read(own, name)
