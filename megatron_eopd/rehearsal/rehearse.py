"""One scoring pass and one optimizer step of one rank, by the trainer's own code. In: Config, a
rank. Out: Rehearsal.

Every sample is as long as the longest, and every microbatch full. Student and teachers are built at
their real size; only their weights are not read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_eopd.config import Config, TeacherConfig
from megatron_eopd.data.packing import Limits, PackedRollouts, exchange_size, rounds_of
from megatron_eopd.data.teacher_prompts import default_teacher
from megatron_eopd.models.build import build_model
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.wire import Message
from megatron_eopd.parallel.worlds import STUDENT, roles_of, separate_layout, student_layout
from megatron_eopd.planning.activations import Lengths, Load
from megatron_eopd.records import MicroBatch, Payload, Prompt, Rollout, teacher_name
from megatron_eopd.rehearsal.watch import Tally, Watch
from megatron_eopd.rehearsal.world import fake_world
from megatron_eopd.schedules import START
from megatron_eopd.teacher.assignment import Item, as_read, items_of, owners_of, plan_by_length
from megatron_eopd.teacher.colocated import ColocatedTeacher
from megatron_eopd.teacher.exchange import expect_head, expect_scores, send_scores, unpack_scores
from megatron_eopd.teacher.model import TeacherModel, payload_shape
from megatron_eopd.teacher.pool import Teacher, TeacherPool
from megatron_eopd.teacher.separate import make_route
from megatron_eopd.training.optimizer import Trainable, make_trainable
from megatron_eopd.training.step import train_step
from megatron_eopd.training.token_loss import TokenLoss


@dataclass(frozen=True)
class Rehearsal:
    """What one rank did."""

    rank: int
    """Of the job."""
    role: str
    """`student`, or the section of a separate teacher."""
    layout: Layout
    num_parameters: int
    """Of the model that is trained, or of the separate teacher, on this rank."""
    num_microbatches: int
    """Of a student's optimizer step."""
    tallies: Mapping[str, Tally]
    """`scoring`, and of a student also `training`."""


def vocab_size_of(config: Config) -> int:
    """Tokens that all models have. A run compares tokenizers; this has config.json files alone."""
    models = (config.student, *config.all_teachers.values())
    return min(read_hf_config(model.hf_path).vocab_size for model in models)


def rehearse(config: Config, world_size: int, rank: int, lengths: Lengths) -> Rehearsal:
    """`rank`: of the job, one of the student's or of a separate teacher's.

    Raises:
        ConfigError: the layouts do not divide their ranks.
    """
    roles = roles_of(config, world_size)
    role = next(role for role in roles.values() if role.holds(rank))
    layout, watch = role.layout(config, rank), Watch()
    students = student_layout(config, world_size)
    load = Load.of(config.training, lengths, students)
    plan = full_plan(load, lengths, students, config)
    with fake_world(layout, watch) as context:
        watch.enter("start")
        if role.name == STUDENT:
            num_parameters = perform_student(config, plan, context, watch)
        else:
            num_parameters = _perform_teacher(config, role.name, plan, students, context, watch)
        watch.enter("end")
    tallies = {
        name: watch.tallies[name] for name in ("scoring", "training") if name in watch.tallies
    }
    return Rehearsal(rank, role.name, layout, num_parameters, load.num_microbatches, tallies)


def full_plan(load: Load, lengths: Lengths, layout: Layout, config: Config) -> PackedRollouts:
    """An optimizer step whose microbatches are all full: as many of the longest samples as go in,
    and a shorter one for the rest."""
    count, rest = divmod(load.tokens, lengths.total)
    rest = rest // layout.sequence_multiple * layout.sequence_multiple
    response = rest * lengths.response // lengths.total
    last = replace(lengths, prompt=rest - response, response=response)
    samples = [lengths] * count + [last] * (response > 0)
    batch = [_rollout(each, config) for each in samples]
    return [[batch] * load.num_microbatches for _ in range(layout.dp)]


def _rollout(lengths: Lengths, config: Config) -> Rollout:
    read, shown = lengths.of_teachers.prompt, {}
    if read != lengths.prompt:
        shown = {teacher_name(section): (0,) * read for section in config.all_teachers}
    ids, scored_by = (0,) * lengths.prompt, default_teacher(config)
    prompt = Prompt(0, "", "", ids, scored_by, teacher_ids=shown)
    return Rollout(prompt, 0, (0,) * lengths.response, (0.0,) * lengths.response, "length", 0)


def perform_student(
    config: Config, plan: PackedRollouts, context: ParallelContext, watch: Watch
) -> int:
    """Returns the parameters of this rank."""
    with watch.kind("optimizer"):
        chunks = build_model(config.student.hf_path, config.model, context)
        student = make_trainable(chunks, config, context)
        student.optimizer.step()  # its moments come with the first step; gradients are 0
    _name_state(student, watch)
    vocab_size = vocab_size_of(config)
    with watch.kind("teacher weights"):
        pool = _open_teachers(config, vocab_size, context)
    # Any end token costs what the real one does.
    token_loss = TokenLoss(chunks[-1], pool.heads, config, vocab_size, context, stop_ids=(0,))
    rounds = rounds_of(plan, exchange_size(config))
    train_step(
        student,
        _Watched(token_loss, watch),
        _portions(pool, rounds, watch),
        context,
        num_rounds=len(rounds),
        progress=START,
        compare_engine=True,
        compare_replicas=True,
        skip_above=2.0 if config.training.skip_grad_norm_factor else None,
        around_update=pool.following(student, steps=1),
    )
    student.gather_parameters()
    return _num_parameters(chunks)


def _name_state(student: Trainable, watch: Watch) -> None:
    for chunk in student.wrapped:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            watch.rename(buffer.grad_data, "gradients")
        watch.rename([p.data for p in chunk.parameters()], "weights")


def _portions(
    pool: TeacherPool, rounds: Sequence[PackedRollouts], watch: Watch
) -> Iterator[list[MicroBatch]]:
    """Scored when the step asks for them."""
    scored = pool.microbatches(rounds)
    for _ in rounds:
        watch.enter("scoring")
        with watch.kind("teacher activations"):
            batches = next(scored)
        payloads = [part.payload for batch in batches for part in batch.teacher]
        watch.rename(payloads, "payload")
        watch.enter("training")
        with watch.kind("activations"):
            yield batches
        del batches, payloads


class _Watched:
    """A TokenLoss, whose memory is that of logits."""

    def __init__(self, token_loss: TokenLoss, watch: Watch) -> None:
        self.settings = token_loss.settings
        self._token_loss, self._watch = token_loss, watch

    def __call__(self, *arguments: Any) -> torch.Tensor:
        with self._watch.kind("logits"):
            return self._token_loss(*arguments)


def _open_teachers(config: Config, vocab_size: int, context: ParallelContext) -> TeacherPool:
    teachers: dict[str, ColocatedTeacher | _Arriving] = {}
    for section, teacher in config.all_teachers.items():
        if teacher.placement == "separate":
            opened = _Arriving(teacher, section, config, vocab_size, context)
        else:
            opened = ColocatedTeacher(
                teacher, section, config, (), vocab_size, context, build_model
            )
        teachers[teacher_name(section)] = opened
    return TeacherPool(teachers, context)


class _Arriving(Teacher):
    """A separate teacher, of which the student's ranks see buffers that fill."""

    def __init__(
        self,
        teacher: TeacherConfig,
        section: str,
        config: Config,
        vocab_size: int,
        context: ParallelContext,
    ) -> None:
        teachers = separate_layout(teacher, section, config, rank=0)
        self._route = make_route(teacher, vocab_size, config, teachers, context.layout)
        self._shape = payload_shape(teacher, vocab_size, config)
        self._limits, self._device = Limits.of(config.training), context.device
        self.head_VH: torch.Tensor | None = None
        if teacher.payload == "hidden" and context.layout.is_last_stage:
            ((dtype, hidden_size),) = self._shape.tensors
            self.head_VH, _ = expect_head(self._route, hidden_size, dtype, self._device)

    def score(self, rounds: Sequence[Mapping[int, Item]]) -> Iterator[dict[int, Payload]]:
        route = self._route
        for items in rounds:
            if not (items and route.student.is_last_stage):
                yield {}
                continue
            owners = owners_of(plan_by_length(items, self._limits, route.teacher))
            parcels = list(expect_scores(items, owners, self._shape, route, self._device))
            yield unpack_scores(items, parcels, self._shape, route, self._device)


def _perform_teacher(
    config: Config,
    section: str,
    plan: PackedRollouts,
    students: Layout,
    context: ParallelContext,
    watch: Watch,
) -> int:
    teacher, layout = config.all_teachers[section], context.layout
    limits = Limits.of(config.training)
    vocab_size = vocab_size_of(config)
    with watch.kind("teacher weights"):
        chunks: list[CausalLM] = []

        def make_model(*arguments: Any) -> list[CausalLM]:
            chunks.extend(build_model(*arguments))
            return chunks

        model = TeacherModel(teacher, config, (), vocab_size, context, make_model)
        if teacher.payload == "hidden":
            model.drop_head()
    route = make_route(teacher, vocab_size, config, layout, students)
    watch.enter("scoring")
    sends: list[Message] = []
    for packed in rounds_of(plan, exchange_size(config)):
        items = as_read(dict(enumerate(items_of(packed))), teacher_name(section))
        own_plan = plan_by_length(items, limits, layout)
        with watch.kind("teacher activations"):
            held = model.score(items, own_plan)
        sends = []  # only now has it arrived
        if layout.is_last_stage:
            sends = list(send_scores(items, owners_of(own_plan), held, route))
        watch.rename([tensor for _, tensor in sends], "teacher payload")
        del held
    return _num_parameters(chunks)


def _num_parameters(chunks: Sequence[CausalLM]) -> int:
    return sum(p.numel() for chunk in chunks for p in chunk.parameters())
