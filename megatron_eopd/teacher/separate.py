"""A teacher on ranks of its own: the student's end, and the loop that the teacher's ranks run.

The student's rank 0 leaves a request in the job's store, the plans of a whole iteration; the
teacher scores round after round and sends, one round ahead of what was taken, while the student
trains on what it has. Both ends compute the same plan of who sends what.
"""

import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_eopd.config import Config, TeacherConfig
from megatron_eopd.data.packing import Limits
from megatron_eopd.errors import Interrupted, LostRankError, TeacherError, WireError
from megatron_eopd.parallel.collectives import naming_stage
from megatron_eopd.parallel.farewell import Farewell
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.wire import JointWire
from megatron_eopd.parallel.worlds import Role, separate_layout
from megatron_eopd.records import Payload
from megatron_eopd.teacher.assignment import Item, owners_of, plan_by_length
from megatron_eopd.teacher.exchange import (
    Route,
    expect_head,
    expect_scores,
    send_head,
    send_scores,
    unpack_scores,
)
from megatron_eopd.teacher.model import (
    Swaps,
    TeacherModel,
    payload_shape,
    vocab_cut,
)

FAREWELL_S = 3.0

Rounds = Sequence[Mapping[int, Item]]


@dataclass(frozen=True)
class Requests:
    """The mailbox of one teacher in the job's store."""

    store: dist.Store

    def post(self, number: int, request: Rounds | Farewell) -> None:
        """By the student's rank 0."""
        self.store.set(f"request/{number}", pickle.dumps(request))
        # With its answers the student has the teacher's word that it was read; not so if it ends
        # early.
        is_early = isinstance(request, Farewell) and request.error is not None
        if number and not is_early:
            self.store.delete_key(f"request/{number - 1}")

    def read(self, number: int, timeout_s: float) -> Rounds | Farewell:
        try:
            self.store.wait([f"request/{number}"], timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            raise TeacherError(
                f"[teacher] the student asked for nothing within {timeout_s:.0f} s; it is gone."
            ) from None
        return pickle.loads(self.store.get(f"request/{number}"))

    def is_stopped(self, number: int) -> bool:
        """Whether the student has left, as it was asked to, instead of taking all that it wanted
        before request `number`. Its word may come a moment after its connections closed."""
        try:
            request = self.read(number, FAREWELL_S)
        except TeacherError:
            return False
        return isinstance(request, Farewell) and request.is_stop

    def fail(self, text: str) -> None:
        self.store.set("failed", text)

    def failure(self) -> str | None:
        return self.store.get("failed").decode() if self.store.check(["failed"]) else None


def make_route(
    teacher: TeacherConfig, vocab_size: int, config: Config, teachers: Layout, students: Layout
) -> Route:
    """Between the two worlds; this rank's place is right in the layout of its own."""
    return Route(
        teacher=teachers,
        student=students,
        teacher_first_rank=students.world_size,
        teacher_cut=vocab_cut(teacher, vocab_size, config, teachers.tp),
        student_cut=vocab_cut(config.student, vocab_size, config, students.tp),
    )


class SeparateTeacher:
    """The student's end."""

    def __init__(
        self,
        teacher: TeacherConfig,
        role: Role,
        config: Config,
        vocab_size: int,
        store: dist.Store,
        context: ParallelContext,
    ) -> None:
        """Waits until the teacher has loaded. Collective over the student's ranks.

        Raises:
            TeacherError: on the ranks that notice that it has not.
        """
        students = context.layout
        teachers = separate_layout(teacher, role.name, config, rank=0)
        self._role = role
        self._route = make_route(teacher, vocab_size, config, teachers, students)
        self._requests = Requests(store)
        self._number = 0
        self._shape = payload_shape(teacher, vocab_size, config)
        self._limits = Limits.of(config.training)
        self._device = context.device
        minutes = config.parallel.distributed_timeout_minutes
        num_ranks = students.world_size + role.size
        self.head_VH: torch.Tensor | None = None
        """As a ColocatedTeacher's."""
        with self._waiting("its start"):
            self._wire = JointWire(store, students.rank, num_ranks, minutes, self._device)
            if teacher.payload == "hidden" and students.is_last_stage:
                ((dtype, hidden_size),) = self._shape.tensors
                self.head_VH, rows = expect_head(self._route, hidden_size, dtype, self._device)
                self._wire.swap([], rows)

    def score(self, rounds: Rounds) -> Iterator[dict[int, Payload]]:
        """As a ColocatedTeacher's, but the request leaves now, and the waiting comes with `next`.

        Raises:
            TeacherError: on the ranks that wait for scores and will not get them.
        """
        if self._route.student.rank == 0:
            self._requests.post(self._number, rounds)
        self._number += 1
        return (self._receive(items) for items in rounds)

    def _receive(self, items: Mapping[int, Item]) -> dict[int, Payload]:
        route = self._route
        if not (items and route.student.is_last_stage):
            return {}
        owners = owners_of(plan_by_length(items, self._limits, route.teacher))
        parcels = list(expect_scores(items, owners, self._shape, route, self._device))
        with self._waiting("its scores"):
            self._wire.swap([], [(p.sender, buffer) for p in parcels for buffer in p.buffers])
        return unpack_scores(items, parcels, self._shape, route, self._device)

    def __enter__(self) -> "SeparateTeacher":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Let the teacher's ranks go, and say why if it is early."""
        if self._route.student.rank == 0:
            self._requests.post(self._number, Farewell.after(error))

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        try:
            yield
        except WireError as error:
            time.sleep(1.0)  # a closed connection may be faster than the word about it
            why = self._requests.failure() or str(error)
            raise TeacherError(
                f"[{self._role.name}] on {self._role.describe()}: waited for {what} in vain: {why}"
            ) from None


def serve(
    teacher: TeacherConfig,
    role: Role,
    config: Config,
    swaps: Swaps,
    vocab_size: int,
    store: dist.Store,
    students: Layout,
    context: ParallelContext,
) -> None:
    """What the ranks of a separate teacher do, until the student lets them go.

    Raises:
        TeacherError: the student is gone, late, or has failed.
        Interrupted: the student was asked to stop.
    """
    requests = Requests(store)
    try:
        _serve(teacher, role, config, swaps, vocab_size, requests, students, context)
    except Interrupted:
        raise
    except Exception as error:
        requests.fail(f"{type(error).__name__}: {error}")
        raise


def _serve(
    teacher: TeacherConfig,
    role: Role,
    config: Config,
    swaps: Swaps,
    vocab_size: int,
    requests: Requests,
    students: Layout,
    context: ParallelContext,
) -> None:
    model = TeacherModel(teacher, config, swaps, vocab_size, context)
    route = make_route(teacher, vocab_size, config, context.layout, students)
    minutes = config.parallel.distributed_timeout_minutes
    rank, num_ranks = students.world_size + context.layout.rank, students.world_size + role.size
    limits, number = Limits.of(config.training), 0
    try:
        wire = JointWire(requests.store, rank, num_ranks, minutes, context.device)
        if teacher.payload == "hidden":
            if context.layout.is_last_stage:
                wire.swap(list(send_head(model.head_VH, route)), [])
                wire.flush()
            model.drop_head()
        while True:
            request = requests.read(number, config.longest_pause_s)
            if isinstance(request, Farewell):
                if request.is_stop:
                    raise Interrupted("the student was stopped, and this teacher with it")
                if request.error is not None:  # nobody takes what is still on its way
                    raise TeacherError(f"[{role.name}] the student ended early: {request.error}")
                break
            for items in filter(None, request):
                plan = plan_by_length(items, limits, route.teacher)
                with naming_stage(f"scoring on rank {rank} ({context.layout.place()})"):
                    held = model.score(items, plan)
                wire.flush()  # of the round before: no third one is ever held
                if context.layout.is_last_stage:
                    wire.swap(list(send_scores(items, owners_of(plan), held, route)), [])
                del held  # what is on its way the wire holds, and the next round is scored
            number += 1
        wire.flush()
    except (WireError, LostRankError) as error:
        if requests.is_stopped(number + 1):
            raise Interrupted("the student was stopped, and this teacher with it") from None
        if isinstance(error, LostRankError):
            raise
        raise TeacherError(f"[{role.name}] the student is gone or late: {error}") from None
