"""A teacher on the student's own ranks, in a layout of its own. In: plans. Out: payloads.

Where the two layouts put the same rollouts on the same ranks, nothing travels; otherwise the scores
go from the teacher's last stage to the student's, through exchange.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_eopd.config import Config, TeacherConfig
from megatron_eopd.data.packing import Limits
from megatron_eopd.models.load import MakeModel, load_model
from megatron_eopd.parallel.init import ParallelContext, second_layout
from megatron_eopd.parallel.wire import GroupWire
from megatron_eopd.parallel.worlds import colocated_layout
from megatron_eopd.records import Payload
from megatron_eopd.teacher.assignment import Item, owners_of, plan_by_length, plan_locally
from megatron_eopd.teacher.exchange import Route, exchange_head, exchange_scores
from megatron_eopd.teacher.following import Followed, StudentWeights
from megatron_eopd.teacher.model import Swaps, TeacherModel, payload_shape, vocab_cut


class ColocatedTeacher:
    def __init__(
        self,
        teacher: TeacherConfig,
        section: str,
        config: Config,
        swaps: Swaps,
        vocab_size: int,
        context: ParallelContext,
        make_model: MakeModel = load_model,
    ) -> None:
        """Collective over all ranks. `section`: the options' section, for messages."""
        own = colocated_context(teacher, section, config, context)
        self._model = TeacherModel(teacher, config, swaps, vocab_size, own, make_model)
        self._shape = payload_shape(teacher, vocab_size, config)
        self._limits = Limits.of(config.training)
        self._device = context.device
        self._wire = GroupWire(dist.group.WORLD, context.device)
        self._route = Route(
            teacher=own.layout,
            student=context.layout,
            teacher_first_rank=0,
            teacher_cut=self._model.cut,
            student_cut=vocab_cut(config.student, vocab_size, config, context.layout.tp),
        )
        self._teacher, self._context, self._own = teacher, context, own
        self._weights: StudentWeights | None = None
        self.head_VH = self._student_head() if teacher.payload == "hidden" else None
        """With the student's cut, on its last stage; None for other payloads."""

    @property
    def model(self) -> TeacherModel:
        return self._model

    @contextmanager
    def following(self, student: Followed, steps: int) -> Iterator[None]:
        """Around an update of the student, the `steps`-th of the run. Collective over all ranks."""
        follower = self._model.follower
        if follower is None:
            yield
            return
        if self._weights is None:
            chunks, path = self._model.chunks, self._teacher.hf_path
            self._weights = StudentWeights(student.chunks, self._context, chunks, self._own, path)
        follower.before_update(self._weights.shards())
        yield
        student.gather_parameters()
        follower.after_update(self._weights.shards(), steps)
        self.take_new_weights()

    def take_new_weights(self) -> None:
        """Those that the follower has now. Collective over all ranks."""
        if self._model.follower is None:
            return
        self._model.take_new_weights()
        if self._teacher.payload == "hidden":
            self.head_VH = self._student_head()

    def _student_head(self) -> torch.Tensor | None:
        if self._route.is_local:
            return self._model.head_VH
        model = self._model
        head_VH = exchange_head(
            model.head_VH, self._route, model.hidden_size, model.dtype, self._wire, self._device
        )
        model.drop_head()
        return head_VH

    def score(self, rounds: Sequence[Mapping[int, Item]]) -> Iterator[dict[int, Payload]]:
        """For each round of items: the payloads of this rank's items, {} off the last stage.

        Collective over all ranks, and computed when asked for.
        """
        for items in rounds:
            # No name for anything here: a generator that waits would hold on to it.
            yield self._score_round(items) if items else {}

    def _score_round(self, items: Mapping[int, Item]) -> dict[int, Payload]:
        teacher = self._route.teacher
        if self._route.is_local:
            return self._model.score(items, plan_locally(items, self._limits, teacher))
        plan = plan_by_length(items, self._limits, teacher)
        held = self._model.score(items, plan)
        return exchange_scores(
            items, owners_of(plan), held, self._shape, self._route, self._wire, self._device
        )


def colocated_context(
    teacher: TeacherConfig, section: str, config: Config, context: ParallelContext
) -> ParallelContext:
    """The student's groups where the ranks are cut the same, else new ones."""
    layout = colocated_layout(teacher, section, context.layout)
    if layout.grid == context.layout.grid:
        return replace(context, layout=layout)
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    return second_layout(layout, timeout, context)
