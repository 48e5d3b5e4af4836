"""Which layouts of a run fit its GPUs, the least cut first. In: a Request. Out: Plans.

Every layout is tried by the trainer's own rules (`student_layout`, `check_student`,
`check_teacher`, `check_budget`), then by memory for the longest samples. How long an iteration
takes is not predicted: the order is that of how many ranks must talk for one copy of the models.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import gcd
from typing import Any

from megatron_eopd.config import Config, ParallelSizes
from megatron_eopd.config.models import LAYERS_OF_STAGES
from megatron_eopd.data.packing import check_budget
from megatron_eopd.errors import ConfigError
from megatron_eopd.models.fit import check_student, check_teacher
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.worlds import STUDENT, roles_of, student_layout
from megatron_eopd.planning.activations import Lengths, Platform
from megatron_eopd.planning.memory import MemoryPlan, Setup, describe, plan_memory
from megatron_eopd.planning.shapes import Models, ModelShape
from megatron_eopd.rollout.placement import ranks_for_engines, seats_of

PIPELINE = "pipeline_model_parallel_size"


@dataclass(frozen=True)
class Request:
    """A run to plan, and what it may use."""

    config: Config
    models: Models
    num_gpus: int
    """Ranks of the job, those of separate teachers included."""
    memory: int
    """Bytes of a GPU that the plan may fill."""
    longest: Lengths
    gpus_per_node: int = 8
    platform: Platform = field(default_factory=Platform)


def longest_sample(
    config: Config,
    models: Models,
    prompt_length: int | None = None,
    teacher_prompt_length: int | None = None,
) -> Lengths:
    """A prompt of `prompt_length`, or as configured, or what the models leave of their positions;
    and the longest response that is trained on. Teachers read the same, or
    `teacher_prompt_length`."""
    response = config.trained_response_length
    shapes = [models.student, *models.teachers.values()]
    room = min(shape.hf_config.max_position_embeddings for shape in shapes) - response
    prompt = prompt_length or max(1, min(config.data.max_prompt_length, room))
    return Lengths(prompt, response, teacher_prompt_length)


@dataclass(frozen=True)
class Plan:
    """A configuration that the trainer would take, with what it needs."""

    request: Request
    config: Config
    layout: Layout
    teachers: dict[str, Layout]
    memory: MemoryPlan

    @property
    def headroom(self) -> int:
        """Bytes that the fullest rank has left; negative where it does not fit."""
        return self.request.memory - self.memory.worst[2].peak

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def options(self) -> list[str]:
        """What a command line must set to get here from the request's configuration."""
        before, after = _sizes_of(self.request.config), _sizes_of(self.config)
        changed = {name: size for name, size in after.items() if before.get(name) != size}
        return [f"{name}={str(size).lower()}" for name, size in changed.items()]


def _sizes_of(config: Config) -> dict[str, Any]:
    """Every option of a layout that the configuration sets, by its name."""
    sections: dict[str, ParallelSizes] = {"parallel": config.parallel}
    for section, teacher in config.all_teachers.items():
        if teacher.parallel:
            sections[f"{section}.parallel"] = teacher.parallel
    return {f"{name}.{key}": x for name, sizes in sections.items() for key, x in sizes}


def check_request(request: Request) -> None:
    """What no layout can mend.

    Raises:
        ConfigError: naming the option.
    """
    rollout, node = request.config.rollout, request.gpus_per_node
    engine = rollout.tensor_model_parallel_size
    room = min(node, rollout.world_size or request.num_gpus)
    if engine > room and request.config.wants_vllm:
        raise ConfigError(
            f"rollout.tensor_model_parallel_size={engine}, but an engine finds {room} GPUs on a "
            f"machine. Set it to {room} or less."
        )
    if request.config.wants_vllm:
        nodes = [rank // node for rank in range(request.num_gpus)]
        seats_of(rollout, ranks_for_engines(request.config, request.num_gpus), nodes)
    for longest in (request.longest, request.longest.of_teachers):
        _check_budget(request, longest, longest.total)


def _check_budget(request: Request, longest: Lengths, num_tokens: int) -> None:
    sample = f"a sample of {longest.total} tokens ({longest.prompt} + {longest.response})"
    check_budget(request.config.training, num_tokens, sample)


def make_plan(config: Config, request: Request) -> Plan:
    """Of the configuration as it is, whether or not it fits.

    Raises:
        ConfigError: the trainer would not take it.
    """
    models = request.models
    layout = student_layout(config, request.num_gpus)
    check_student(config, models.student.hf_config, layout)
    _check_budget(request, request.longest, layout.padded(request.longest.total))
    setup = Setup.of(config, models, layout, request.longest, request.platform)
    teachers = {section: teacher.layout for section, teacher in setup.teachers.items()}
    for section, options in config.all_teachers.items():
        check_teacher(options, section, models.teachers[section].hf_config, teachers[section])
    return Plan(request, config, layout, teachers, plan_memory(setup))


def search(request: Request) -> list[Plan]:
    """Every cut of the student that the trainer takes, whether or not it fits, the fewest
    model-parallel ranks of all models first. Teachers are as configured; where that is not
    possible, or does not fit, they are cut over as few ranks as will do."""
    teacher_sizes = [None, *_teacher_sizes(request)]
    plans = []
    for config in _student_cuts(request):
        plan = None
        for sizes in teacher_sizes:
            plan = _better(plan, _with_teacher_sizes(config, sizes), request)
            if plan is not None and plan.fits:
                break
        if plan is not None:
            plans.append(plan)
    return sorted(plans, key=_order)


def _better(plan: Plan | None, config: Config, request: Request) -> Plan | None:
    """The plan, or that of the configuration where it has more headroom."""
    try:
        other = make_plan(config, request)
    except ConfigError:
        return plan
    return other if plan is None or other.headroom > plan.headroom else plan


def _order(plan: Plan) -> tuple[int, int]:
    layouts = (plan.layout, *plan.teachers.values())
    return sum(map(model_parallel_ranks, layouts)), -plan.headroom


def model_parallel_ranks(layout: Layout) -> int:
    """Ranks that one copy of the model is cut over, and one sequence."""
    return layout.pp * max(layout.tp * layout.cp, layout.ep * layout.expert_tp)


def _student_cuts(request: Request) -> Iterator[Config]:
    """The configuration with every size of the student's that could be; what the trainer refuses is
    among them. Interleaving stays as configured where there is a pipeline; so do numbers of layers
    on as many stages as they are configured for, and elsewhere all stages are alike."""
    config, parallel = request.config, request.config.parallel
    ranks = roles_of(config, request.num_gpus)[STUDENT].size
    own_pp = parallel.pipeline_model_parallel_size
    for sizes in _cuts(ranks, [request.models.student], request.gpus_per_node, own_pp):
        chunks, pp = parallel.virtual_pipeline_model_parallel_size, sizes[PIPELINE]
        if pp == 1:
            chunks = 1
        if pp != own_pp:
            sizes = sizes | dict.fromkeys(LAYERS_OF_STAGES)
        for cp in _divisors(ranks):
            if cp == 1 or 2 * cp <= request.longest.total:
                update = {
                    **sizes,
                    "context_parallel_size": cp,
                    "virtual_pipeline_model_parallel_size": chunks,
                }
                yield config.model_copy(update={"parallel": parallel.model_copy(update=update)})


def _cuts(
    ranks: int, shapes: list[ModelShape], gpus_per_node: int, own_pp: int = 1
) -> Iterator[dict[str, int]]:
    """Sizes that every model has: tensor parallelism within a node, sequence parallelism wherever
    there is tensor parallelism, and experts that are dealt out whole or cut as dense layers are.
    `own_pp`: stages that need not divide the layers."""
    num_layers = gcd(*(len(shape.layers) for shape in shapes))
    num_experts = max(shape.num_experts for shape in shapes)
    pipelines = {*_divisors(gcd(ranks, num_layers)), *({own_pp} & {*_divisors(ranks)})}
    for tp, pp in product(_divisors(gcd(ranks, gpus_per_node)), sorted(pipelines)):
        dealt = [(ep, 1) for ep in _divisors(gcd(ranks, num_experts)) if ep > 1]
        for ep, expert_tp in [(1, tp), *dealt] if num_experts else [(1, 1)]:
            yield {
                "tensor_model_parallel_size": tp,
                PIPELINE: pp,
                "expert_model_parallel_size": ep,
                "expert_tensor_parallel_size": expert_tp,
                "sequence_parallel": tp > 1,
            }


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _teacher_sizes(request: Request) -> list[ParallelSizes]:
    """Sizes of their own for all teachers alike, the fewest ranks first."""
    config = request.config
    roles = roles_of(config, request.num_gpus)
    ranks = gcd(*(roles.get(s, roles[STUDENT]).size for s in config.all_teachers))
    shapes = list(request.models.teachers.values())
    found = [ParallelSizes(**sizes) for sizes in _cuts(ranks, shapes, request.gpus_per_node)]
    return sorted(found, key=_ranks_of_sizes)


def _ranks_of_sizes(sizes: ParallelSizes) -> int:
    experts = sizes.expert_model_parallel_size * sizes.expert_tensor_parallel_size
    tp, pp = sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size
    return pp * max(tp, experts)


def _with_teacher_sizes(config: Config, sizes: ParallelSizes | None) -> Config:
    """None leaves the teachers as configured."""
    if sizes is None:
        return config
    change = {"parallel": sizes}
    others = {name: other.model_copy(update=change) for name, other in config.teachers.items()}
    teacher = config.teacher.model_copy(update=change)
    return config.model_copy(update={"teacher": teacher, "teachers": others})


HELPS = {
    "weights": "more tensor-, pipeline- or expert-parallel ranks, model.dtype=bfloat16",
    "gradients": "more tensor-, pipeline- or expert-parallel ranks, no others cut them",
    "optimizer": "more GPUs, all of which cut the optimizer's state",
    "teacher_weights": "teacher.offload=true, teacher.placement=separate with "
    "teacher.world_size; if it is separate, a larger teacher.world_size",
    "offloaded_teacher": "teacher.placement=separate with teacher.world_size",
    "teacher_head": "teacher.payload=logits",
    "engine": "a smaller rollout.kv_cache_gib, a larger rollout.tensor_model_parallel_size, or "
    "rollout.placement=separate with rollout.world_size",
    "payload": "a small teacher.microbatches_per_exchange",
    "teacher_payload": "a small teacher.microbatches_per_exchange",
    "teacher_messages": "a small teacher.microbatches_per_exchange",
    "activations": "model.recompute_granularity=full, a smaller "
    "training.max_tokens_per_microbatch or training.micro_batch_size, a smaller "
    "rollout.max_response_length",
    "teacher_activations": "a smaller training.max_tokens_per_microbatch or "
    "training.micro_batch_size",
    "logits": "objective.head=chunked",
    "vocab_gradients": "more tensor-parallel ranks",
}


def explain(plan: Plan) -> str:
    """Why a plan does not fit: whose rank, which parts, and what makes the large ones smaller."""
    who, stage, memory = plan.memory.worst
    parts = memory.parts_of_peak
    large = sorted((name for name in parts if 10 * parts[name] > memory.peak), key=parts.get)
    helps = "".join(f"\n  {name.replace('_', ' ')}: {HELPS[name]}" for name in reversed(large))
    return (
        f"{plan.layout.describe()} needs {memory.peak / 2**30:.1f} GiB on a rank of pipeline stage "
        f"{stage} of the {who}, and {plan.request.memory / 2**30:.1f} GiB may be used: "
        f"{describe(parts)}. What makes the large parts smaller:{helps}"
    )
