"""Everything that can be found wrong before a process group, a model or an engine exists.

In: a Config and a world size. Out: nothing, or an error that names the option; and the derived
numbers that --dry-run prints.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megatron_eopd.checkpoints.files import put_back
from megatron_eopd.checkpoints.position import read_position
from megatron_eopd.checkpoints.resume import (
    Candidates,
    check_position,
    check_schedules,
    choose_checkpoints,
)
from megatron_eopd.config import Config, TeacherConfig, TrainingConfig
from megatron_eopd.data.packing import Limits, check_budget
from megatron_eopd.data.preview import render_preview
from megatron_eopd.data.prompts import PromptSet, load_prompts
from megatron_eopd.data.run_tokenizers import RunTokenizers, load_run_tokenizers
from megatron_eopd.data.teacher_prompts import (
    PromptsOfTeachers,
    names_of_teachers,
    prompts_of_teachers,
    shown_more,
)
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.data.vocabulary import check_shared
from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.grading_pool import check_answers as check_gold
from megatron_eopd.evaluation.problems import ProblemSet, grading_pool, load_problem_sets
from megatron_eopd.evaluation.report_file import names_of_figures
from megatron_eopd.metrics.sinks.choice import check_logins, check_packages
from megatron_eopd.models.fit import (
    check_same_architecture,
    check_student,
    check_teacher,
    check_vllm,
)
from megatron_eopd.models.hf_config import read_hf_config, unknown_keys
from megatron_eopd.models.load import check_files
from megatron_eopd.models.megatron_config import uses_transformer_engine
from megatron_eopd.parallel.init import own_rank
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.worlds import student_layout, teacher_layout
from megatron_eopd.planning.activations import Lengths, Load, Platform
from megatron_eopd.planning.memory import Placed, Setup, describe, describe_saving, plan_memory
from megatron_eopd.planning.shapes import Models
from megatron_eopd.records import Prompt, teacher_name
from megatron_eopd.rollout.choice import EngineChoice, choose_engine
from megatron_eopd.rollout.placement import assumed_nodes, places_of
from megatron_eopd.rollout.recording import Recording
from megatron_eopd.tasks.registry import training_rows
from megatron_eopd.weight_sync.share import check_allocator

SHOWN_OWNERS = 8


@dataclass(frozen=True)
class Inputs:
    """What the checks had to read anyway, and the run goes on with."""

    tokenizers: RunTokenizers
    prompts: PromptSet | None
    """To train on; None where nothing is trained and no checkpoint was."""
    problem_sets: list[ProblemSet]
    """To evaluate on."""
    max_sequence_length: int
    """Longest prompt and response together, in tokens, of training and evaluation; 0 where there is
    neither."""
    engine: EngineChoice
    recording: Recording | None
    """What a run with `rollout.replay` trains on, or a scoring scores."""
    candidates: Candidates
    warnings: list[str]
    """What nobody can tell to be wrong, and a person should look at; the candidates have more."""


def check(config: Config, world_size: int, *, trains: bool = True) -> Inputs:
    """An evaluation alone does not train: it needs no teacher, and reads neither prompts nor
    recordings; without problems to evaluate on it is a scoring, which reads a recording.

    Raises:
        ConfigError, CheckpointError: naming the option, its value and what would be right.
    """
    config.check_inputs_exist()
    if trains:
        config.check_has_teacher()
    _check_writable(config.run_dir)
    if trains:
        check_packages(config.logging.trackers)
        if own_rank()[0] == 0:  # no other opens them
            check_logins(config.logging.trackers)
    layout = student_layout(config, world_size)
    uses_transformer_engine(config.model)
    student = read_hf_config(config.student.hf_path)
    check_student(config, student, layout)
    check_files(config.student.hf_path)
    for section, teacher in config.all_teachers.items():
        _check_layout(teacher, section, config, layout)
        check_files(teacher.hf_path)
    tokenizers = load_run_tokenizers(config)
    tokenizer = tokenizers.student
    shown = prompts_of_teachers(config, tokenizers.teachers)
    prompts = _training_prompts(config, tokenizer, shown) if trains else None
    problem_sets = load_problem_sets(config, tokenizer, shown)
    if trains and config.checkpoint.keep_best is not None:
        _check_keep_best(config, [problems.name for problems in problem_sets])
    held_out = [prompt for problems in problem_sets for prompt in problems.prompts]
    sequences = chain(prompts.sequences() if prompts else (), ((p, p.prompt_ids) for p in held_out))
    check_shared(sequences, tokenizers.vocab_size, tokenizer)
    engine = choose_engine(config)
    if engine.is_vllm:
        check_vllm(student)
        check_allocator(os.environ, torch.cuda.is_available())
        places_of(config, assumed_nodes(world_size))
    sections = {"rollout": list(prompts) if prompts else [], "evaluation": held_out}
    longest = max(
        (_check_lengths(each, own, config, layout) for each, own in sections.items() if own),
        default=0,
    )
    candidates = _candidates(config, prompts, tokenizer.digest)
    begins_at = candidates.directories[0] if candidates.directories else None
    first_iteration = read_position(begins_at).iteration if begins_at else 0
    reads_recording = trains or not problem_sets
    recording = recording_of(config, tokenizers.vocab_size, layout) if reads_recording else None
    if trains and recording is not None:
        recording.check_files(range(first_iteration, config.training.train_iters))
    return Inputs(
        tokenizers=tokenizers,
        prompts=prompts,
        problem_sets=problem_sets,
        max_sequence_length=longest,
        engine=engine,
        recording=recording,
        candidates=candidates,
        warnings=[
            *_unknown_keys(config),
            *tokenizers.warnings,
            *(prompts.warnings if prompts else []),
            *shown.warnings(),
            *_idle_teachers(config),
        ],
    )


def _idle_teachers(config: Config) -> list[str]:
    """Teachers that have nothing to teach."""
    return [
        f"[{section}] is the student and reads what the student reads: both say the same, or "
        f"nearly so. Show it more with data.teacher_prompt_template or {section}.prompt.*."
        for section, teacher in config.all_teachers.items()
        if teacher.source == "student" and teacher_name(section) not in shown_more(config)
    ]


def _check_writable(run_dir: Path) -> None:
    """Before hours of work have nowhere to go."""
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"run_dir={run_dir}: {existing} is no directory. Set another run_dir.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run_dir={run_dir}: nothing may be written in {existing}. Set another run_dir, or "
            f"see to its permissions."
        )


def _unknown_keys(config: Config) -> list[str]:
    paths = dict.fromkeys(m.hf_path for m in (config.student, *config.all_teachers.values()))
    return [warning for path in paths if (warning := unknown_keys(path)) is not None]


def recording_of(config: Config, vocab_size: int, layout: Layout) -> Recording | None:
    """What `rollout.replay` names."""
    if config.rollout.replay is None:
        return None
    if not config.rollout.replay.is_dir():
        raise ConfigError(f"rollout.replay={config.rollout.replay}: no such directory.")
    models = [read_hf_config(m.hf_path) for m in (config.student, *config.all_teachers.values())]
    max_length = min(model.max_position_embeddings for model in models)
    budget = config.training.max_tokens_per_microbatch
    if budget is not None:
        max_length = min(max_length, budget - budget % layout.sequence_multiple)
    _check_recorded_teachers(config)
    formula = config.objective.formula
    sections = {teacher_name(section): t for section, t in config.all_teachers.items()}
    shown = {n: read_hf_config(sections[n].hf_path).vocab_size for n in shown_more(config)}
    return Recording(
        config.rollout.replay,
        num_rollouts=config.rollout.batch_size,
        vocab_size=vocab_size,
        max_length=max_length,
        teachers=names_of_teachers(config),
        shown_more=shown,
        refuses_references=(
            f"objective.reverse_kl={formula.reverse_kl}" if formula.needs_sampled_tokens else ""
        ),
    )


def _check_recorded_teachers(config: Config) -> None:
    """A recording holds what teachers were shown: by other options they would not read it."""
    path = config.rollout.replay.parent / "config.json"
    if not path.is_file():  # a folder of somebody's own
        return
    options: list[tuple[str, Any, Any]] = []
    with suppress(ValueError, KeyError, TypeError, AttributeError):  # of no run of this version
        before, now = json.loads(path.read_text()), json.loads(config.model_dump_json())
        options += _prompt_options(before, now)
    for name, ours, theirs in options:
        if ours != theirs:
            raise ConfigError(
                f"rollout.replay={config.rollout.replay}: it was recorded with {name}={theirs}, "
                f"and {name}={ours} now; what teachers read is in the recording. Set it as it was, "
                f"or draw responses anew."
            )


def _prompt_options(before: dict, now: dict) -> Iterator[tuple[str, Any, Any]]:
    """(option, its value now, its value in a recorded run)."""
    for name in ("teacher_prompt_key", "teacher_prompt_template"):
        yield f"data.{name}", now["data"][name], before["data"][name]
    yield "teacher.prompt", now["teacher"]["prompt"], before["teacher"]["prompt"]
    for name, teacher in now["teachers"].items():
        if name in before["teachers"]:
            other = before["teachers"][name]["prompt"]
            yield f"teachers.{name}.prompt", teacher["prompt"], other
    mixes = [tree["objective"]["teacher_mixture"] != "none" for tree in (now, before)]
    if mixes[0] != mixes[1]:
        yield (
            "objective.teacher_mixture",
            *(tree["objective"]["teacher_mixture"] for tree in (now, before)),
        )


def _check_layout(teacher: TeacherConfig, section: str, config: Config, student: Layout) -> None:
    layout = teacher_layout(teacher, section, config, student)
    hf_config = read_hf_config(teacher.hf_path)
    check_teacher(teacher, section, hf_config, layout)
    if teacher.follows:
        check_same_architecture(teacher, section, hf_config, config.student)


def _training_prompts(
    config: Config, tokenizer: Tokenizer, read_by_teachers: PromptsOfTeachers
) -> PromptSet:
    reads_references = config.rollout.uses_references and config.rollout.replay is None
    return load_prompts(
        config.data,
        tokenizer,
        config.seed,
        names_of_teachers(config),
        rows=training_rows(config.data.prompts),
        read_by_teachers=read_by_teachers,
        max_reference_length=config.rollout.max_response_length if reads_references else None,
    )


def _check_keep_best(config: Config, tasks: list[str]) -> None:
    asked = config.checkpoint.keep_best
    if not tasks:
        raise ConfigError(
            f"checkpoint.keep_best={asked}: nothing is evaluated. Set evaluation.tasks."
        )
    figures = names_of_figures(config.evaluation.samples_per_problem)
    names = {f"{task}/{figure}" for task in tasks for figure in figures}
    if asked not in names | (figures if len(tasks) == 1 else set()):
        raise ConfigError(
            f"checkpoint.keep_best={asked} is no figure of this run's evaluations. Write FIGURE, "
            f"or TASK/FIGURE where there are several tasks ({', '.join(tasks)}); figures are "
            f"{', '.join(sorted(figures))}."
        )


def _check_lengths(section: str, prompts: Sequence[Prompt], config: Config, layout: Layout) -> int:
    """The longest prompt of the student and response together, of the section's samples; in
    tokens."""
    response_length, option = config.rollout.max_response_length, "rollout.max_response_length"
    if section == "evaluation":
        response_length = config.evaluation_response_length
        if config.evaluation.max_response_length is not None:
            option = "evaluation.max_response_length"
    readers = {"student": (config.student, [p.prompt_ids for p in prompts])} | {
        name: (teacher, [p.ids_for(teacher_name(name)) for p in prompts if scores(name, p)])
        for name, teacher in config.all_teachers.items()
    }
    longest = {}
    for who, (model, read) in readers.items():
        longest[who] = length = max(map(len, read), default=0)
        told = f"the longest prompt of {length} tokens with {option}={response_length}"
        told += f", as [{who}] reads it" * (length > longest["student"])
        if config.all_teachers:  # which score it
            check_budget(config.training, layout.padded(length + response_length), told)
        limit = read_hf_config(model.hf_path).max_position_embeddings
        if length + response_length > limit:
            raise ConfigError(
                f"the longest prompt that the {who} reads has {length} tokens, and with {option}="
                f"{response_length} that makes {length + response_length}; its "
                f"max_position_embeddings is {limit}. {_shorter(option, limit - length)}"
            )
    return longest["student"] + response_length


def _shorter(option: str, room: int) -> str:
    return f"Set {option}={room} or less, or ask less." if room > 0 else "Ask less."


def scores(section: str, prompt: Prompt) -> bool:
    """Whether this teacher scores the prompt's responses."""
    return prompt.is_scored_by(teacher_name(section))


def check_answers(config: Config, inputs: Inputs) -> None:
    """Grade what each problem of an evaluation says is right. By one rank: it starts processes.

    Raises:
        ConfigError: naming the problems that no answer could be right for.
    """
    if inputs.problem_sets:
        with grading_pool(inputs.problem_sets, config.evaluation) as pool:
            for problems in inputs.problem_sets:
                check_gold(problems.task, problems.problems, pool)


def _candidates(config: Config, prompts: PromptSet | None, tokenizer_digest: str) -> Candidates:
    """Checkpoints that the run may go on from, or that are evaluated."""
    candidates = choose_checkpoints(config, trains=prompts is not None)
    for directory in candidates.directories:
        position = read_position(directory)
        if prompts is not None:
            check_position(directory, position, prompts, tokenizer_digest, config)
            check_schedules(directory, position, config)
    return candidates


def with_checkpoints_of_now(config: Config, inputs: Inputs) -> Inputs:
    """As they are once nobody else can write any, with those that a killed job left between two
    names. By who holds the run's lock."""
    put_back(config.run_dir)
    tokenizer_digest = inputs.tokenizers.student.digest
    return replace(inputs, candidates=_candidates(config, inputs.prompts, tokenizer_digest))


def derived_numbers(config: Config, inputs: Inputs, world_size: int) -> dict[str, str]:
    """What --dry-run prints beside the configuration."""
    rollout, training = config.rollout, config.training
    candidates = inputs.candidates.directories
    tokenizer = inputs.tokenizers.student
    setup = Setup.of(
        config,
        Models.of(config),
        student_layout(config, world_size),
        Lengths(
            inputs.prompts.longest,
            config.trained_response_length,
            max(inputs.prompts.longest_for(teacher_name(name)) for name in config.all_teachers),
        ),
        Platform(torch.cuda.is_available(), uses_transformer_engine(config.model)),
    )
    tokens = training.global_batch_size * rollout.max_response_length
    parameters = ", ".join(
        f"{who} {max(p.total for p in placed.parameters):,}"
        for who, placed in {"student": setup.student, **setup.teachers}.items()
    )
    plan = plan_memory(setup)
    who, stage, fullest = plan.worst
    return {
        "layout": setup.student.layout.describe(),
        "vocabulary": f"{inputs.tokenizers.vocab_size:,} tokens are compared; the student has "
        f"{tokenizer.vocab_size:,} columns, padded to {_padded(setup.student):,}; tokenizer "
        f"{tokenizer.digest[:12]}",
        **{
            section: _describe_teacher(section, placed, config, inputs)
            for section, placed in setup.teachers.items()
        },
        **(
            {"mixture of teachers": config.objective.teacher_mixture}
            if config.objective.teacher_mixture != "none"
            else {}
        ),
        "prompts": _describe_prompts(inputs.prompts),
        "prompts / iteration": f"{rollout.batch_size // rollout.samples_per_prompt} × "
        f"{rollout.samples_per_prompt} samples = {rollout.batch_size}",
        "rollouts": _describe_engines(config, inputs, world_size),
        **_describe_references(config),
        **_describe_evaluation(config, inputs.problem_sets),
        "optimizer steps": f"{config.optimizer_steps_per_iteration} / iteration × "
        f"{training.train_iters} = {config.optimizer_steps}",
        "response tokens / step": f"at most {training.global_batch_size} × "
        f"{rollout.max_response_length} = {tokens:,}",
        "microbatches / step / rank": _microbatches(training, setup.student.load),
        "parameters / rank": f"{parameters} (largest stage)",
        **_describe_layers(setup),
        "memory / rank": f"{fullest.peak / 2**30:.3g} GiB on stage {stage} of the {who}, the "
        f"fullest, as docs/planning.md counts: {describe(fullest.parts_of_peak)}",
        "checkpoints": describe_saving(plan.checkpoint_share, config.checkpoint),
        "starts": f"from {candidates[0]}" if candidates else "at iteration 0",
    }


def evaluation_numbers(config: Config, inputs: Inputs, world_size: int) -> dict[str, str]:
    """What an evaluation that trains nothing says of itself."""
    candidates = inputs.candidates.directories
    teachers = ", ".join(f"{name} {t.hf_path}" for name, t in config.all_teachers.items())
    return {
        "layout": student_layout(config, world_size).describe(),
        "model": str(candidates[0] if candidates else config.student.hf_path),
        "teachers": teachers or "none, so no divergences are measured",
        "samples": _describe_engines(config, inputs, world_size),
        **_describe_evaluation(config, inputs.problem_sets),
    }


def _describe_engines(config: Config, inputs: Inputs, world_size: int) -> str:
    if not inputs.engine.is_vllm:
        return inputs.engine.why
    seats = places_of(config, assumed_nodes(world_size)).seats
    size, placement = config.rollout.tensor_model_parallel_size, config.rollout.placement
    one = f"TP {size}, " if size > 1 else ""
    engines = "1 engine" if len(seats) == 1 else f"{len(seats)} engines"
    owners = ", ".join(str(seat.owner) for seat in seats[:SHOWN_OWNERS])
    more = f" and {len(seats) - SHOWN_OWNERS} more" if len(seats) > SHOWN_OWNERS else ""
    ranks = "rank" if len(seats) == 1 else "ranks"
    return f"{inputs.engine.why}: {engines}, {one}{placement}, of {ranks} {owners}{more}"


def _describe_evaluation(config: Config, problem_sets: Sequence[ProblemSet]) -> dict[str, str]:
    options = config.evaluation
    drawn = (
        f"{options.samples_per_problem} samples, temperature {config.evaluation_temperature:g}, "
        f"top_p {options.top_p:g}, at most {config.evaluation_response_length:,} tokens"
    )
    return {
        f"evaluation on {problems.name}": f"{len(problems.problems):,} problems × {drawn}"
        for problems in problem_sets
    }


def preview(inputs: Inputs) -> str:
    """The first prompt as student and teachers read it: what a person would look at first. Empty
    where the prompts are those of a recording."""
    prompts = inputs.prompts or [p for problems in inputs.problem_sets for p in problems.prompts]
    if not prompts:
        return ""
    tokenizers = inputs.tokenizers
    shown = [render_preview(tokenizers.student, prompts[0].prompt_ids)]
    for section, tokenizer in tokenizers.teachers.items():
        own = next((prompt for prompt in prompts if scores(section, prompt)), prompts[0])
        who = section if own is prompts[0] else f"{section}, of prompt {own.index},"
        shown.append(render_preview(tokenizer, own.ids_for(teacher_name(section)), who))
    return "\n".join(["the first prompt", *shown])


def _describe_prompts(prompts: PromptSet) -> str:
    cut = f"; {prompts.num_cut} chats went on behind the question, and were cut there"
    return f"{len(prompts)}, the longest {prompts.longest} tokens{cut * (prompts.num_cut > 0)}"


def _describe_references(config: Config) -> dict[str, str]:
    rollout = config.rollout
    if not rollout.uses_references:
        return {}
    first, last = rollout.reference_fraction, rollout.final_reference_fraction
    if last is None:
        share = f"{first:g} of the prompts"
    else:
        iters = rollout.reference_schedule_iters or config.training.train_iters
        share = f"{first:g} → {last:g} of the prompts over {iters} iterations"
    return {
        "reference answers": f"{share} ({rollout.reference_schedule}), data.response_key="
        f"{config.data.response_key}"
    }


def _describe_teacher(section: str, placed: Placed, config: Config, inputs: Inputs) -> str:
    """What it hands over, and from where; the tokenizer was compared with the student's."""
    options = config.all_teachers[section]
    swaps = ", ".join(f"{a} ↔ {b}" for a, b in inputs.tokenizers.swaps[section])
    longest = inputs.prompts.longest_for(teacher_name(section))
    reads = f", reads prompts of up to {longest} tokens" if longest > inputs.prompts.longest else ""
    what = ""
    if options.source == "student":
        way = options.way_of_following or "as it began"
        if options.ema_decay is not None:
            way += f"={options.ema_decay:g}"
        what = f"the student itself, {way}; "
    if len(config.all_teachers) > 1:
        own = sum(scores(section, prompt) for prompt in inputs.prompts)
        what += f"weight {options.weight:g}, scores {own:,} of {len(inputs.prompts):,} prompts; "
    return (
        f"{what}{placed.layout.describe()}, {options.placement}{reads}; {options.payload}, "
        f"hidden size {placed.shape.hidden_size:,}, vocabulary padded to {_padded(placed):,}"
        f"{f', tokens that trade places {swaps}' if swaps else ''}"
    )


def _describe_layers(setup: Setup) -> dict[str, str]:
    """Of the models whose pipeline stages are not all alike."""
    models = {"student": setup.student, **setup.teachers}
    shown = [
        f"{who} {' + '.join(map(str, placed.layout.layers_per_stage(len(placed.shape.layers))))}"
        for who, placed in models.items()
        if placed.layout.is_uneven
    ]
    return {"layers / stage": ", ".join(shown)} if shown else {}


def _padded(placed: Placed) -> int:
    """Vocabulary columns of all tensor-parallel ranks, padding included."""
    return placed.columns * placed.layout.tp


def _microbatches(training: TrainingConfig, load: Load) -> str:
    limits = Limits.of(training)
    if limits.max_tokens is None:
        return f"{load.num_microbatches} × {limits.max_sequences} samples"
    return f"at most {load.num_microbatches} × {limits.max_tokens} tokens"
