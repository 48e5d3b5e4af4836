"""Checks of options in different sections against each other. In: a Config. Out: nothing, or an
error that names both options, their values, and what to set.

Sections check themselves; what needs a model, a file or a world size is in preflight.py.
"""

from typing import TYPE_CHECKING

from pydantic import ValidationError

from megatron_eopd.config.data import BUILT_IN_TASKS
from megatron_eopd.config.models import LAYERS_OF_STAGES
from megatron_eopd.objectives import FORWARD_KL, GATES, REVERSE_KL, fits_top_k

if TYPE_CHECKING:
    from megatron_eopd.config.config import Config


def check_across_sections(config: "Config") -> None:
    """
    Raises:
        ValueError: the first contradiction.
    """
    _check_batches(config)
    _check_reference_schedule(config)
    if config.rollout.uses_references and config.rollout.replay is None:
        _check_references(config)
    _check_temperatures(config)
    _check_engines(config)
    _check_layouts(config)
    if config.teacher is None:
        _check_no_teacher(config)
        return
    _check_teachers(config)
    _check_teacher_prompts(config)
    _check_self_teachers(config)
    _check_mixture(config)
    if GATES[config.objective.formula.gate].needs_whole_step:
        _check_whole_step(config)
    if config.teacher.payload == "topk":
        _check_top_k(config)
    if config.objective.logits_dtype == "float32" and config.teacher.payload == "logits":
        raise ValueError(
            "objective.logits_dtype=float32, and teacher.payload=logits hands over logits in the "
            "teacher's dtype, rounded. Set teacher.payload=hidden or topk."
        )


def _check_batches(config: "Config") -> None:
    rollout, training = config.rollout, config.training
    if rollout.batch_size % rollout.samples_per_prompt:
        raise ValueError(
            f"rollout.batch_size={rollout.batch_size} counts samples, and is not a multiple of "
            f"rollout.samples_per_prompt={rollout.samples_per_prompt}. Set "
            f"rollout.batch_size={_multiple(rollout.batch_size, rollout.samples_per_prompt)}."
        )
    if rollout.batch_size % training.global_batch_size:
        raise ValueError(
            f"rollout.batch_size={rollout.batch_size} is not a multiple of "
            f"training.global_batch_size={training.global_batch_size}, so the last optimizer "
            f"step of an iteration would be short. Set rollout.batch_size="
            f"{_multiple(rollout.batch_size, training.global_batch_size)}."
        )


def _multiple(value: int, of: int) -> int:
    """The smallest multiple of `of` that is not below `value`."""
    return -(-value // of) * of


def _check_reference_schedule(config: "Config") -> None:
    rollout = config.rollout
    schedule = (rollout.reference_schedule, rollout.reference_schedule_iters)
    if rollout.final_reference_fraction is None and schedule != ("linear", None):
        raise ValueError(
            f"rollout.reference_schedule={schedule[0]} and rollout.reference_schedule_iters="
            f"{schedule[1]} would be ignored without rollout.final_reference_fraction. Set it, "
            f"or leave them out."
        )


def _check_references(config: "Config") -> None:
    fractions = (
        f"rollout.reference_fraction={config.rollout.reference_fraction:g} (final "
        f"{config.rollout.final_reference_fraction})"
    )
    if config.data.prompts in BUILT_IN_TASKS:
        raise ValueError(
            f"{fractions} trains on reference answers, and data.prompts={config.data.prompts} "
            f"has none. Set data.prompts to a file that has, or the fractions to 0."
        )
    if config.data.response_key is None:
        raise ValueError(
            f"{fractions} trains on reference answers, and data.response_key does not say "
            f"which key of {config.data.prompts} holds them."
        )
    if config.objective.formula.needs_sampled_tokens:
        raise ValueError(
            f"objective.reverse_kl={config.objective.formula.reverse_kl} needs tokens that the "
            f"student sampled, and {fractions} brings others. Set objective.reverse_kl=full, "
            f"or the fractions to 0."
        )


def _check_temperatures(config: "Config") -> None:
    formula, student = config.objective.formula, config.student_temperature
    if formula.needs_sampled_tokens and student != config.rollout.temperature:
        raise ValueError(
            f"objective.reverse_kl={formula.reverse_kl} compares the student at "
            f"objective.student_temperature={student} with the engine's log-probabilities at "
            f"rollout.temperature={config.rollout.temperature}. Set both to the same value."
        )


def _check_engines(config: "Config") -> None:
    rollout = config.rollout
    if rollout.placement == "separate" and not config.wants_vllm:
        raise ValueError(
            f"rollout.placement=separate with rollout.world_size={rollout.world_size} keeps ranks "
            f"for vLLM engines, and this run starts none (rollout.engine={rollout.engine}, "
            f"rollout.replay={rollout.replay}). Set rollout.placement=colocated."
        )


def _check_layouts(config: "Config") -> None:
    teachers = config.all_teachers.items()
    own = [(f"{where}.parallel", t.parallel) for where, t in teachers if t.parallel]
    for where, sizes in [("parallel", config.parallel), *own]:
        if sizes.sequence_parallel and sizes.tensor_model_parallel_size == 1:
            raise ValueError(
                f"{where}.sequence_parallel=true needs {where}.tensor_model_parallel_size > 1; "
                f"it is 1. Set {where}.sequence_parallel=false."
            )
        for option in LAYERS_OF_STAGES:
            count = getattr(sizes, option)
            if count is not None and sizes.pipeline_model_parallel_size == 1:
                raise ValueError(
                    f"{where}.{option}={count} is of one pipeline stage among several, and "
                    f"{where}.pipeline_model_parallel_size is 1. Set it above 1, or leave the "
                    f"number of layers out."
                )
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    if chunks > 1 and config.parallel.pipeline_model_parallel_size == 1:
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size={chunks} interleaves the chunks of "
            f"pipeline stages, and parallel.pipeline_model_parallel_size is 1. Set it above 1."
        )


def _check_no_teacher(config: "Config") -> None:
    if config.teachers:
        raise ValueError(
            f"[teachers.{next(iter(config.teachers))}] without [teacher], whose are the prompts "
            f"that name no teacher. Name one of them [teacher]."
        )


def _check_teachers(config: "Config") -> None:
    payloads = {teacher.payload for teacher in config.all_teachers.values()}
    if len(payloads) > 1:
        raise ValueError(
            f"teachers with different payloads {sorted(payloads)}: one objective would mean "
            f"different things for them. Set the same payload for all."
        )
    for name, teacher in config.teachers.items():
        if teacher.microbatches_per_exchange is not None:
            raise ValueError(
                f"teachers.{name}.microbatches_per_exchange would be ignored: all teachers "
                f"hand over the same portions. Set teacher.microbatches_per_exchange."
            )
    if not config.teachers and config.teacher.weight != 1:
        raise ValueError(
            f"teacher.weight={config.teacher.weight:g} is of one teacher among several, and there "
            f"is only [teacher]: it would scale the learning signal. Leave it out; for larger or "
            f"smaller steps set training.lr."
        )


def _check_self_teachers(config: "Config") -> None:
    for section, teacher in config.all_teachers.items():
        is_frozen = teacher.source == "student" and not teacher.follows
        if is_frozen and teacher.hf_path != config.student.hf_path:
            raise ValueError(
                f"{section}.source=student is the student itself, and {section}.hf_path="
                f"{teacher.hf_path} another model. Set {section}.hf_path=none, or "
                f"{section}.source=checkpoint."
            )


def _check_mixture(config: "Config") -> None:
    mixture = config.objective.teacher_mixture
    if mixture == "none":
        return
    if not config.teachers:
        raise ValueError(
            f"objective.teacher_mixture={mixture} mixes several teachers, and there is only "
            f"[teacher]. Add [teachers.NAME], or leave the option out."
        )
    if mixture == "distributions" and config.teacher.payload == "topk":
        raise ValueError(
            "objective.teacher_mixture=distributions needs the whole distribution of each teacher, "
            "and teacher.payload=topk holds a part of it. Set teacher.payload=hidden, or "
            "teacher_mixture=divergences."
        )
    if mixture == "divergences" and config.objective.inplace_backward:
        raise ValueError(
            "objective.inplace_backward=true overwrites logits that teacher_mixture=divergences "
            "reads once for each teacher. Set inplace_backward=false."
        )
    if mixture == "divergences" and GATES[config.objective.formula.gate].needs_whole_step:
        raise ValueError(
            f"objective.gate={config.objective.formula.gate} finds one threshold among the "
            f"entropies of all tokens, and teacher_mixture=divergences has several at each. Set "
            f"gate=hard, or teacher_mixture=distributions."
        )


def _check_teacher_prompts(config: "Config") -> None:
    for section, teacher in config.all_teachers.items():
        if teacher.prompt is None:
            continue
        try:
            teacher.prompt.in_place_of(config.data)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(map(str, first["loc"]))
            told = first["msg"].removeprefix("Value error, ")
            raise ValueError(
                f"{section}.prompt, in the place of data: {option}={first['input']!r}: {told}"
            ) from None


def _check_whole_step(config: "Config") -> None:
    """Logits are handed over in portions whether or not an option asks for it."""
    teacher = config.teacher
    if teacher.microbatches_per_exchange is not None or teacher.payload == "logits":
        raise ValueError(
            f"objective.gate={config.objective.formula.gate} needs the entropies of a whole "
            f"optimizer step before its first microbatch, and teacher.payload={teacher.payload} "
            f"with teacher.microbatches_per_exchange={teacher.microbatches_per_exchange} hands "
            f"over a part of the step at a time. Set teacher.payload=hidden or topk, and "
            f"teacher.microbatches_per_exchange=none."
        )


def _check_top_k(config: "Config") -> None:
    """What needs the teacher's whole distribution cannot be had from its top k."""
    objective, formula = config.objective, config.objective.formula
    for option, value, possible in (
        ("reverse_kl", formula.reverse_kl, fits_top_k(REVERSE_KL)),
        ("forward_kl", formula.forward_kl, fits_top_k(FORWARD_KL)),
        ("top_k_support", objective.top_k_support, ["teacher"]),
    ):
        if value not in possible:
            raise ValueError(
                f"teacher.payload=topk holds objective.top_k={objective.top_k} tokens of each "
                f"distribution, and objective.{option}={value} needs all of them. Set "
                f"objective.{option} to {' or '.join(possible)}, objective.name=eopd_paper, or "
                f"teacher.payload=hidden."
            )
