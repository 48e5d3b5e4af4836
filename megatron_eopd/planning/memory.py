"""Memory of one rank of each pipeline stage. In: Config, models' shapes, layouts. Out: bytes.

Pure functions of integers: nothing is built. Weights, gradients and optimizer state are counted
parameter by parameter, without the padding of Megatron's buffers; activations are estimated, see
activations.py. What is on a GPU beside all this (CUDA's context, NCCL's buffers, fragmentation) is
for the caller to leave room for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache

import torch

from megatron_eopd.config import CheckpointConfig, Config, TeacherConfig
from megatron_eopd.data.packing import exchange_size
from megatron_eopd.losses.chunked_head import chunk_size, logits_dtype, overwrites_logits
from megatron_eopd.parallel.layout import Layout, pad_vocab_size
from megatron_eopd.parallel.worlds import teacher_layout
from megatron_eopd.planning.activations import (
    Activations,
    Lengths,
    Load,
    Platform,
    activation_bytes,
)
from megatron_eopd.planning.shapes import Models, ModelShape, layers_of_stage


@dataclass(frozen=True)
class Parameters:
    """Of one rank."""

    dense: int
    """Sharded by the optimizer over data- and context-parallel ranks."""
    experts: int
    """Sharded by the optimizer over the ranks that hold the same experts."""

    @property
    def total(self) -> int:
        return self.dense + self.experts


@cache
def parameters_per_stage(
    shape: ModelShape, layout: Layout, padded_vocab: int, *, with_head: bool = True
) -> tuple[Parameters, ...]:
    """Of one rank of each pipeline stage. `with_head`: whether the last has an LM head."""
    embedding = padded_vocab // layout.tp * shape.hidden_size
    stages = []
    for stage in range(layout.pp):
        layers = layers_of_stage(shape, layout, stage)
        dense = sum(n * (w.replicated + w.split // layout.tp) for w, n in layers.items())
        experts = sum(n * w.experts for w, n in layers.items()) // (layout.ep * layout.expert_tp)
        if stage == 0:
            dense += embedding
        if stage == layout.pp - 1:
            dense += shape.hidden_size  # the last norm
            # A tied head is a second copy on another stage, and nothing on the same one.
            if with_head and not (shape.is_tied and layout.pp == 1):
                dense += embedding
        stages.append(Parameters(dense, experts))
    return tuple(stages)


def training_state(parameters: Parameters, layout: Layout, dtype: str) -> dict[str, int]:
    """Bytes of weights, gradients and Megatron's distributed optimizer of one rank.

    Gradients are float32. The optimizer has two float32 moments, and float32 master weights of
    bfloat16 ones, each on one of the ranks that hold the same parameters.
    """
    return {
        "weights": parameters.total * itemsize(dtype),
        "gradients": parameters.total * 4,
        "optimizer": _share(parameters, layout, _state_bytes(dtype)),
    }


def _state_bytes(dtype: str) -> int:
    return 8 if dtype == "float32" else 12


def _share(parameters: Parameters, layout: Layout, bytes_each: int) -> int:
    """Of the rank, where those that hold the same parameters share them."""
    expert_replicas = layout.stage_size // (layout.ep * layout.expert_tp)
    dense = -(-parameters.dense * bytes_each // (layout.dp * layout.cp))
    return dense - (-parameters.experts * bytes_each // expert_replicas)


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the fullest rank of a pipeline stage, part by part."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    teacher_weights: int = 0
    """Without those that are offloaded."""
    teacher_head: int = 0
    """In the student's cut, where it is not part of the teacher's own weights."""
    engine: int = 0
    """vLLM's weights and key/value cache on the trainer's GPUs, while it is awake."""
    payload: int = 0
    """What the teachers have handed over for the microbatches of an exchange."""
    activations: int = 0
    """Of the student's microbatches in flight."""
    logits: int = 0
    """Of the loss: the student's, the teacher's, and their gradient."""
    vocab_gradients: int = 0
    """Of the LM head, until added to the float32 gradients; of its input."""
    offloaded_teacher: int = 0
    """Weights that come to the GPU to score."""
    teacher_activations: int = 0
    teacher_payload: int = 0
    """On the teacher's last stage, before it travels to the student's."""
    teacher_messages: int = 0
    """The same, on its way."""

    def during(self, phase: str) -> int:
        """One of PHASES, with what is there always. Engines let go of their memory while the
        student trains, and the student keeps no activations while they sample or teachers score."""
        return sum(getattr(self, name) for name in (*ALWAYS, *PHASES[phase]))

    @property
    def while_training(self) -> int:
        return self.during("training")

    @property
    def peak(self) -> int:
        return self.during(self.fullest_phase)

    @property
    def fullest_phase(self) -> str:
        return max(PHASES, key=self.during)

    @property
    def parts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in PARTS}

    @property
    def parts_of_peak(self) -> dict[str, int]:
        return {n: size for n, size in self.parts.items() if n in (*ALWAYS, *self._fullest)}

    @property
    def _fullest(self) -> tuple[str, ...]:
        return PHASES[self.fullest_phase]


PARTS = tuple(field.name for field in fields(StageMemory))
PHASES = {
    "training": ("payload", "activations", "logits", "vocab_gradients"),
    "scoring": ("offloaded_teacher", "teacher_activations", "teacher_payload"),
    "exchanging": ("payload", "teacher_payload", "teacher_messages"),
    "sampling": ("engine",),
}
ALWAYS = tuple(name for name in PARTS if not any(name in own for own in PHASES.values()))


@dataclass(frozen=True)
class MemoryPlan:
    """Every kind of rank that a run has."""

    stages: dict[str, list[StageMemory]]
    """Of the `student`, and of teachers on ranks of their own by the name of their section."""
    checkpoint_share: int
    """Bytes of a checkpoint that the fullest rank writes, from a copy in host memory."""

    @property
    def worst(self) -> tuple[str, int, StageMemory]:
        """(whose, stage, memory) of the fullest rank."""
        places = [(who, n, s) for who, stages in self.stages.items() for n, s in enumerate(stages)]
        return max(places, key=lambda place: place[2].peak)


@dataclass(frozen=True)
class Placed:
    """A model on its ranks, and the tokens that come to them."""

    shape: ModelShape
    layout: Layout
    dtype: str
    padded_vocab: int
    load: Load
    platform: Platform

    @property
    def columns(self) -> int:
        """Of the vocabulary, on one rank."""
        return self.padded_vocab // self.layout.tp

    @property
    def parameters(self) -> tuple[Parameters, ...]:
        """Of one rank of each stage."""
        return parameters_per_stage(self.shape, self.layout, self.padded_vocab)

    @property
    def activations(self) -> Activations:
        e = itemsize(self.dtype)
        return Activations(self.shape, self.layout, self.load, e, self.platform)


@dataclass(frozen=True)
class Setup:
    """A configuration on its ranks, for samples of given lengths."""

    config: Config
    student: Placed
    teachers: dict[str, Placed]
    """By the names of their sections, as `Config.all_teachers` has them."""
    lengths: Lengths

    @classmethod
    def of(
        cls, config: Config, models: Models, layout: Layout, lengths: Lengths, platform: Platform
    ) -> "Setup":
        """
        Raises:
            ConfigError: a teacher's sizes do not divide its ranks.
        """

        def place(shape: ModelShape, layout: Layout, dtype: str, lengths: Lengths) -> Placed:
            divisible_by = config.model.make_vocab_size_divisible_by
            padded_vocab = pad_vocab_size(shape.vocab_size, divisible_by, layout.tp)
            load = Load.of(config.training, lengths, layout)
            return Placed(shape, layout, dtype, padded_vocab, load, platform)

        teachers = {
            section: place(
                models.teachers[section],
                teacher_layout(teacher, section, config, layout),
                config.dtype_of(teacher),
                lengths.of_teachers,
            )
            for section, teacher in config.all_teachers.items()
        }
        student = place(models.student, layout, config.model.dtype, lengths)
        return cls(config, student, teachers, lengths)

    def is_local(self, section: str) -> bool:
        """Whether the student's ranks have scored their own samples, so that nothing travels."""
        is_colocated = self.options_of(section).placement == "colocated"
        return is_colocated and self.teachers[section].layout.cuts_like(self.student.layout)

    def options_of(self, section: str) -> TeacherConfig:
        return self.config.all_teachers[section]

    @property
    def microbatches_per_exchange(self) -> int:
        """Of a student's rank."""
        count = self.student.load.num_microbatches
        return min(count, exchange_size(self.config) or count)


def plan_memory(setup: Setup) -> MemoryPlan:
    stages = {"student": [_student_stage(setup, n) for n in range(setup.student.layout.pp)]}
    for section, teacher in setup.teachers.items():
        if setup.options_of(section).placement == "separate":
            pp = teacher.layout.pp
            stages[section] = [_teacher_stage(setup, section, n) for n in range(pp)]
    return MemoryPlan(stages, checkpoint_share(setup))


def checkpoint_share(setup: Setup) -> int:
    """As each data-parallel rank writes what it optimizes: weights, masters and moments; and the
    first one of a teacher that follows the student all that this has."""
    student = setup.student
    bytes_each = itemsize(student.dtype) + _state_bytes(student.dtype)
    own = max(_share(parameters, student.layout, bytes_each) for parameters in student.parameters)
    followers = (s for s in setup.teachers if setup.options_of(s).follows)
    return own + sum(
        max(p.total for p in setup.teachers[s].parameters)
        * _bytes_kept(setup.options_of(s), setup.teachers[s].dtype)
        for s in followers
    )


def describe_saving(share: int, options: CheckpointConfig) -> str:
    """How the fullest rank writes its share of a checkpoint, and what memory that takes."""
    size = f"{share / 2**30:.3g} GiB on the fullest rank"
    if not options.async_save:
        return f"{size}; training waits while it is written (checkpoint.async_save=false)"
    if share > options.staging_gib * 2**30:
        return (
            f"{size}, more than checkpoint.staging_gib={options.staging_gib:g}: training waits "
            f"while it is written"
        )
    return f"{size}, copied into host memory and written while training goes on"


def _student_stage(setup: Setup, stage: int) -> StageMemory:
    student, config = setup.student, setup.config
    own = StageMemory(
        **training_state(student.parameters[stage], student.layout, student.dtype),
        activations=activation_bytes(student.activations, stage, config.model),
        engine=_engine_bytes(setup, stage),
    )
    is_last = stage == student.layout.pp - 1
    if is_last:
        own = replace(
            own,
            vocab_gradients=_vocab_gradient_bytes(setup),
            logits=_logit_bytes(setup),
            payload=_payload_bytes(setup),
            teacher_head=_teacher_head_bytes(setup),
        )
    return _with_colocated_teachers(own, setup, stage)


def _with_colocated_teachers(own: StageMemory, setup: Setup, stage: int) -> StageMemory:
    """All teachers' weights stay; only one of the teachers scores at a time."""
    found = [
        _fullest(
            _teacher_stage(setup, section, n)
            for n in _stages_on_ranks_of(teacher.layout.pp, setup.student.layout.pp, stage)
        )
        for section, teacher in setup.teachers.items()
        if setup.options_of(section).placement == "colocated"
    ]
    scoring = _fullest(found)
    return replace(
        own,
        teacher_weights=sum(teacher.teacher_weights for teacher in found),
        offloaded_teacher=scoring.offloaded_teacher,
        teacher_activations=scoring.teacher_activations,
        teacher_payload=scoring.teacher_payload,
        teacher_messages=scoring.teacher_messages,
    )


def _stages_on_ranks_of(teacher_pp: int, student_pp: int, stage: int) -> range:
    """The teacher's pipeline stages on the ranks of one of the student's."""
    return range(stage * teacher_pp // student_pp, -(-(stage + 1) * teacher_pp // student_pp))


def _fullest(stages: Iterable[StageMemory]) -> StageMemory:
    """The largest of every part."""
    parts = [stage.parts for stage in stages]
    names = parts[0] if parts else {}
    return StageMemory(**{name: max(p[name] for p in parts) for name in names})


def _teacher_stage(setup: Setup, section: str, stage: int) -> StageMemory:
    """The teacher's part of the memory of a rank, colocated or alone."""
    teacher, options = setup.teachers[section], setup.options_of(section)
    # Where the student has the head in its own cut, nobody needs it in the teacher's, except as
    # the copy of a tied embedding.
    travels = options.payload == "hidden" and not setup.is_local(section)
    with_head = teacher.shape.is_tied or not travels or options.follows
    parameters = parameters_per_stage(
        teacher.shape, teacher.layout, teacher.padded_vocab, with_head=with_head
    )[stage]
    weights = parameters.total * itemsize(teacher.dtype)
    kept = parameters.total * _bytes_kept(options, teacher.dtype)
    is_cast = options.ema_decay is not None and teacher.dtype != "float32"
    activations = teacher.activations
    layers = layers_of_stage(teacher.shape, teacher.layout, stage)
    # Forward only: a layer at work, what it got, and what the stage sends on.
    at_work = max(activations.forward_layer(w) for w in layers) + 2 * activations.layer_input
    is_last = stage == teacher.layout.pp - 1
    if is_last and options.payload == "topk":
        rows = min(teacher.load.response_tokens, _chunk_size(setup))
        at_work += 2 * rows * teacher.columns * itemsize(teacher.dtype)
    held = _payload_held(setup, section) if is_last else 0
    if options.placement == "separate":  # of the round before, and perhaps still on its way
        at_work += held
    return StageMemory(
        teacher_weights=0 if options.offload else kept,
        offloaded_teacher=weights if options.offload or is_cast else 0,
        teacher_activations=at_work,
        teacher_payload=held,
        # Copied where samples or columns for several ranks lie in one tensor.
        teacher_messages=0 if setup.is_local(section) else held,
    )


def _bytes_kept(options: TeacherConfig, dtype: str) -> int:
    """Of a parameter: a mean is in float32, and every step of lag has a copy."""
    return 4 if options.ema_decay is not None else itemsize(dtype) * (options.lag_steps or 1)


def _chunk_size(setup: Setup) -> int:
    return chunk_size(setup.config.objective, setup.student.platform.on_gpu)


def _payload_held(setup: Setup, section: str) -> int:
    if setup.is_local(section):  # the student's own, before it is joined in microbatches
        return _payload_bytes(setup)
    teacher, student = setup.teachers[section], setup.student
    share = setup.microbatches_per_exchange * student.layout.dp / teacher.layout.dp
    row = _payload_row(setup, section, teacher.columns)
    return int(share * student.load.response_tokens * row)


def _payload_bytes(setup: Setup) -> int:
    """On a rank of the student's last stage, while it trains."""
    student = setup.student
    tokens = setup.microbatches_per_exchange * student.load.response_tokens // student.layout.cp
    rows = [_payload_row(setup, section, student.columns) for section in setup.teachers]
    return tokens * (max(rows) if setup.config.objective.teacher_mixture == "none" else sum(rows))


def _payload_row(setup: Setup, section: str, columns: int) -> int:
    """What a teacher hands over about one token."""
    teacher, payload = setup.teachers[section], setup.options_of(section).payload
    if payload == "topk":  # an id and a log-probability each, and three numbers
        return 12 * min(setup.config.objective.top_k, teacher.shape.vocab_size) + 12
    return itemsize(teacher.dtype) * (columns if payload == "logits" else teacher.shape.hidden_size)


def _teacher_head_bytes(setup: Setup) -> int:
    """LM heads that hidden states need, on the student's last stage."""
    total = 0
    for section, teacher in setup.teachers.items():
        is_extra = setup.options_of(section).offload or not setup.is_local(section)
        if setup.options_of(section).payload == "hidden" and is_extra:
            size = setup.student.columns * teacher.shape.hidden_size
            total += size * itemsize(teacher.dtype)
    return total


def _logit_rows(setup: Setup) -> int:
    """Rows of logits that exist at once."""
    rows = setup.student.load.response_tokens // setup.student.layout.cp
    is_chunked = setup.config.objective.head == "chunked"
    return min(rows, _chunk_size(setup)) if is_chunked else rows


def _logit_bytes(setup: Setup) -> int:
    """Student's logits and their gradient, and the teacher's where they are made here."""
    objective, student = setup.config.objective, setup.student
    own = itemsize(student.dtype)
    logit = 4 if logits_dtype(objective) == torch.float32 else own
    row = logit * (1 if overwrites_logits(objective) else 2)
    if logit > own:  # the gradient, as the products behind it take it
        row += own
    sizes = [itemsize(teacher.dtype) for teacher in setup.teachers.values()]
    if objective.teacher_mixture == "none":
        row += max(logit, *sizes) if setup.config.teacher.payload == "hidden" else 0
    elif objective.teacher_mixture == "divergences":  # each sweep keeps its own, and adds up
        row += sum(max(logit, size) for size in sizes) + own
    else:
        row += 4 + sum(max(logit, size) for size in sizes)
    return _logit_rows(setup) * student.columns * row


def _vocab_gradient_bytes(setup: Setup) -> int:
    """On the last stage, while all activations are there. An embedding's comes behind the backward
    pass of all layers, when those of its microbatch are gone, and is less than they were."""
    student = setup.student
    e = itemsize(student.dtype)
    objective = setup.config.objective
    if objective.head == "chunked" or logits_dtype(objective):  # added to main gradients at once
        return e * student.load.response_tokens // student.layout.cp * student.shape.hidden_size
    return e * student.columns * student.shape.hidden_size


def _engine_bytes(setup: Setup, stage: int) -> int:
    """Of the engine's worker on a GPU of the student's, if it is one on which an engine sits."""
    rollout, student = setup.config.rollout, setup.student
    is_elsewhere = rollout.placement == "separate" or not setup.config.wants_vllm
    if is_elsewhere or not student.platform.on_gpu:
        return 0
    size, first_rank = rollout.tensor_model_parallel_size, stage * student.layout.stage_size
    if rollout.num_engines is not None and first_rank >= rollout.num_engines * size:
        return 0
    weights = student.shape.num_parameters * itemsize(setup.config.dtype_of(rollout))
    return weights // size + int(rollout.kv_cache_gib * 2**30)


def describe(parts: Mapping[str, int]) -> str:
    """`weights 1.2, gradients 2.4, …` in GiB, the largest first, without what is nothing."""
    shown = sorted(((size, name) for name, size in parts.items() if size), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.3g}" for size, name in shown)
