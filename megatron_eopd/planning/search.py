"""Which layouts of a run fit its GPUs, the fastest first. In: a Request. Out: Plans.

Every layout is tried by the trainer's own rules (`Layout.from_config`, `check_divides`), then by
memory for the longest samples, then by time for samples of mean length.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from math import gcd

from megatron_eopd.config import Config, ConfigError, ParallelConfig, ParallelSizes
from megatron_eopd.data.packing import check_budget
from megatron_eopd.models.fit import check_student, check_teacher
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.worlds import STUDENT, roles_of, student_layout
from megatron_eopd.planning.activations import Lengths, Platform
from megatron_eopd.planning.memory import (
    MemoryPlan,
    Setup,
    describe,
    itemsize,
    plan_memory,
)
from megatron_eopd.planning.shapes import Models, ModelShape
from megatron_eopd.planning.time import (
    Calibration,
    IterationTime,
    Machine,
    estimate,
)

RECOMPUTE = (None, "selective", "full")


# eq=False: hashed by identity, as its models are.
@dataclass(frozen=True, eq=False)
class Request:
    """A run to plan, and what it may use."""

    config: Config
    models: Models
    num_gpus: int
    """Ranks of the job, those of separate teachers included."""
    memory: int
    """Bytes of a GPU that the plan may fill."""
    longest: Lengths
    mean: Lengths
    machine: Machine = field(default_factory=Machine)
    platform: Platform = field(default_factory=Platform)
    calibration: Calibration = field(default_factory=Calibration)


@dataclass(frozen=True, eq=False)
class Plan:
    """A configuration that the trainer would take, with what it needs."""

    request: Request
    config: Config
    layout: Layout
    teachers: dict[str, Layout]
    memory: MemoryPlan

    @cached_property
    def setup_of_mean(self) -> Setup:
        """For samples of mean length: what the time is estimated from."""
        request = self.request
        return Setup.of(self.config, request.models, self.layout, request.mean, request.platform)

    @cached_property
    def time(self) -> IterationTime:
        estimated = estimate(self.setup_of_mean, self.request.machine)
        return self.request.calibration.time(estimated)

    @cached_property
    def headroom(self) -> int:
        """Bytes that the fullest rank has left; negative where it does not fit."""
        return self.request.memory - self.memory.worst[2].peak

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def options(self) -> list[str]:
        """What it sets, as overrides of a command line."""
        parallel, model = self.config.parallel, self.config.model
        sections = {"parallel": parallel}
        unset = []
        configured = self.request.config.all_teachers
        for section, teacher in self.config.all_teachers.items():
            if teacher.parallel:
                sections[f"{section}.parallel"] = teacher.parallel
            elif configured[section].parallel:
                unset.append(f"{section}.parallel=none")
        return [
            *(
                f"{section}.{name}={str(getattr(sizes, name)).lower()}"
                for section, sizes in sections.items()
                for name in _size_names(sizes)
            ),
            *unset,
            f"model.recompute_granularity={model.recompute_granularity or 'none'}",
        ]


def _size_names(sizes: ParallelSizes) -> list[str]:
    names = list(ParallelSizes.model_fields)
    if isinstance(sizes, ParallelConfig):
        names += ["virtual_pipeline_model_parallel_size", "context_parallel_size"]
    return names


def check_request(request: Request) -> None:
    """What no layout can mend.

    Raises:
        ConfigError: naming the option.
    """
    config, longest = request.config, request.longest.total
    engine, node = config.rollout.tensor_model_parallel_size, request.machine.gpus_per_node
    room = node if config.rollout.visible_devices else min(node, request.num_gpus)
    if engine > room and config.rollout.engine != "megatron":
        raise ConfigError(
            f"rollout.tensor_model_parallel_size={engine}, but vLLM finds {room} GPUs on the "
            f"machine of rank 0. Set it to {room} or less."
        )
    prompt, response = request.longest.prompt, request.longest.response
    sample = f"a sample of {longest} tokens ({prompt} + {response})"
    check_budget(config.training, longest, sample)


def make_plan(config: Config, request: Request) -> Plan:
    """Of the configuration as it is, whether or not it fits.

    Raises:
        ConfigError: the trainer would not take it.
    """
    layout = student_of(config, request)
    return _plan_on(layout, config, request)


def _plan_on(layout: Layout, config: Config, request: Request) -> Plan:
    models = request.models
    setup = Setup.of(config, models, layout, request.longest, request.platform)
    teachers = {section: teacher.layout for section, teacher in setup.teachers.items()}
    for section, options in config.all_teachers.items():
        check_teacher(options, section, models.teachers[section].hf_config, teachers[section])
    memory = plan_memory(setup).with_estimates(request.calibration.memory)
    return Plan(request, config, layout, teachers, memory)


def student_of(config: Config, request: Request) -> Layout:
    """The student's layout, where the trainer would take it.

    Raises:
        ConfigError: it would not.
    """
    layout = student_layout(config, request.num_gpus)
    check_student(config, request.models.student.hf_config, layout)
    return layout


@dataclass(frozen=True)
class Found:
    """Of a search."""

    plans: list[Plan]
    """Those that fit, the fastest first; of equally fast ones the one with more headroom."""
    closest: Plan | None
    """Of those that do not fit, the one that needs least."""

    @property
    def distinct(self) -> list[Plan]:
        """The best of those that cut the models alike: they differ in interleaving, sequence
        parallelism or recomputation."""
        best: dict[tuple, Plan] = {}
        for plan in self.plans:
            layouts = (plan.layout, *plan.teachers.values())
            cuts = tuple(replace(x, sequence_parallel=False, vpp=1) for x in layouts)
            best.setdefault(cuts, plan)
        return list(best.values())


def search(request: Request) -> Found:
    plans: list[Plan] = []
    closest = None
    for config in candidates(request):
        plan = _with_teachers_that_fit(config, request)
        if plan is None:
            continue
        if plan.fits:
            plans.append(plan)
        elif closest is None or plan.headroom > closest.headroom:
            closest = plan
    plans.sort(key=lambda plan: (plan.time.total, -plan.headroom))
    return Found(plans, closest)


def candidates(request: Request) -> Iterator[Config]:
    """The configuration in every layout that could be; what the trainer refuses is among them."""
    config, shape = request.config, request.models.student
    ranks = roles_of(config, request.num_gpus)[STUDENT].size
    for tp, pp, cp in product(_divisors(ranks), repeat=3):
        is_possible = (
            ranks % (tp * pp * cp) == 0
            and request.machine.gpus_per_node % tp == 0
            and len(shape.layers) % pp == 0
            and 2 * cp <= request.longest.total
        )
        if not is_possible:
            continue
        chunk_counts = _divisors(len(shape.layers) // pp) if pp > 1 else [1]
        for vpp, (ep, expert_tp), sequence_parallel, recompute in product(
            chunk_counts, _expert_sizes(shape, ranks // pp, tp), {False, tp > 1}, RECOMPUTE
        ):
            parallel = config.parallel.model_copy(
                update={
                    "tensor_model_parallel_size": tp,
                    "pipeline_model_parallel_size": pp,
                    "expert_model_parallel_size": ep,
                    "expert_tensor_parallel_size": expert_tp,
                    "sequence_parallel": sequence_parallel,
                    "virtual_pipeline_model_parallel_size": vpp,
                    "context_parallel_size": cp,
                }
            )
            model = config.model.model_copy(update={"recompute_granularity": recompute})
            yield config.model_copy(update={"parallel": parallel, "model": model})


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _expert_sizes(shape: ModelShape, stage_size: int, tp: int) -> list[tuple[int, int]]:
    """(expert-parallel, expert-tensor-parallel): dealt out whole, or each cut as a dense layer."""
    if not shape.num_experts:
        return [(1, 1)]
    parts = [ep for ep in _divisors(shape.num_experts) if ep > 1 and stage_size % ep == 0]
    return [(1, tp), *((ep, 1) for ep in parts)]


def _with_teachers_that_fit(config: Config, request: Request) -> Plan | None:
    """Teachers as configured; in sizes of their own only where that does not divide or fit, and
    then spread over as few ranks as possible. None where it cannot be."""
    try:
        layout = student_of(config, request)
    except ConfigError:
        return None
    best = _try(layout, config, request)
    if best is not None and best.fits:
        return best
    for sizes, room in _teacher_sizes(request):
        if best is not None and _without_teachers(best) > room:
            continue
        plan = _try(layout, _with_teacher_sizes(config, sizes), request)
        if plan is not None and (best is None or plan.headroom > best.headroom):
            best = plan
        if best is not None and best.fits:
            break
    return best


def _try(layout: Layout, config: Config, request: Request) -> Plan | None:
    try:
        return _plan_on(layout, config, request)
    except ConfigError:
        return None


def _without_teachers(plan: Plan) -> int:
    """Bytes of the student's fullest rank, if it had no teacher beside it."""
    return max(
        s.weights + s.gradients + s.optimizer + s.engine + s.activations + s.logits
        for s in plan.memory.stages["student"]
    )


@cache
def _teacher_sizes(request: Request) -> list[tuple[ParallelSizes | None, int]]:
    """As the student; then sizes of their own, the least spread first. Each with the bytes that it
    leaves to the student beside it, at most."""
    config, shapes = request.config, request.models.teachers
    roles = roles_of(config, request.num_gpus)
    ranks = gcd(*(roles.get(s, roles[STUDENT]).size for s in config.all_teachers))
    num_layers = gcd(*(len(shape.layers) for shape in shapes.values()))
    biggest = max(shapes.values(), key=lambda shape: shape.num_parameters)
    found = []
    for tp, pp in product(_divisors(ranks), _divisors(num_layers)):
        if ranks % (tp * pp) or request.machine.gpus_per_node % tp:
            continue
        for ep, expert_tp in _expert_sizes(biggest, ranks // pp, tp):
            sizes = ParallelSizes(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=expert_tp,
                sequence_parallel=tp > 1,
            )
            found.append((sizes, _room_beside(sizes, request)))
    found = [(sizes, room) for sizes, room in found if room > 0]
    found.sort(key=lambda entry: -entry[1])
    return [(None, request.memory), *reversed(found)]


def _room_beside(sizes: ParallelSizes, request: Request) -> int:
    """What colocated teachers in these sizes leave free on a rank, if nothing but their layers'
    weights counted."""
    dense = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size
    expert = (
        sizes.expert_model_parallel_size
        * sizes.expert_tensor_parallel_size
        * sizes.pipeline_model_parallel_size
    )
    taken = 0
    for section, teacher in request.config.all_teachers.items():
        if teacher.placement == "colocated" and not teacher.offload:
            layers = request.models.teachers[section].layers
            split, experts = sum(w.split for w in layers), sum(w.experts for w in layers)
            e = itemsize(request.config.dtype_of(teacher))
            taken += e * (split // dense + experts // expert)
    return request.memory - taken


def _with_teacher_sizes(config: Config, sizes: ParallelSizes | None) -> Config:
    """For all teachers alike."""
    change = {"parallel": sizes}
    return config.model_copy(
        update={
            "teacher": config.teacher.model_copy(update=change),
            "teachers": {n: t.model_copy(update=change) for n, t in config.teachers.items()},
        }
    )


ADVICE = {
    "weights": "Use more GPUs, or model.dtype=bfloat16.",
    "gradients": "Use more GPUs: gradients are cut over tensor, pipeline and expert ranks only.",
    "optimizer": "Use more GPUs: the optimizer's state is cut over all of them.",
    "teacher_weights": "Set teacher.offload=true, or teacher.placement=separate with "
    "teacher.world_size.",
    "offloaded_teacher": "Set teacher.placement=separate with teacher.world_size.",
    "teacher_head": "Set teacher.payload=logits.",
    "engine": "Set a smaller rollout.kv_cache_gib, a larger rollout.tensor_model_parallel_size, or "
    "rollout.visible_devices to GPUs of vLLM's own.",
    "payload": "Set teacher.microbatches_per_exchange to a small number.",
    "teacher_payload": "Set teacher.microbatches_per_exchange to a small number.",
    "activations": "Set training.micro_batch_size or training.max_tokens_per_microbatch lower, or "
    "rollout.max_response_length.",
    "teacher_activations": "Set training.micro_batch_size or training.max_tokens_per_microbatch "
    "lower.",
    "logits": "Set objective.head=chunked.",
    "vocab_gradients": "Use more tensor-parallel ranks.",
}


def explain(plan: Plan) -> str:
    """Why a plan does not fit: whose rank, which parts, and what to set about the largest."""
    who, stage, memory = plan.memory.worst
    parts = memory.parts_of_peak
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"{plan.layout.describe()} needs {memory.peak / 2**30:.1f} GiB on a rank of pipeline stage "
        f"{stage} of the {who}, and {plan.request.memory / 2**30:.1f} GiB may be used: "
        f"{describe(parts)}. {ADVICE[largest]}"
    )
