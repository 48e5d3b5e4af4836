"""Which checkpoint a run goes on from, and whether it may. In: Config, prompts. Out: a directory.

A resumed run is the run that it would have been, so what its samples or schedules depend on must be
as it was; all other options may change, and are told.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_eopd.checkpoints import files
from megatron_eopd.checkpoints.loader import verify
from megatron_eopd.checkpoints.position import Position, read_position
from megatron_eopd.config import Config
from megatron_eopd.data.prompts import PromptSet
from megatron_eopd.errors import CheckpointError, ConfigError
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.run_log import RunLog


@dataclass(frozen=True)
class Candidates:
    """What a run may go on from, the first that proves to be sound."""

    directories: list[Path]
    """The newest first; empty: the run begins."""
    warnings: list[str]
    """Of newer ones that are damaged."""


def choose_checkpoints(config: Config, *, trains: bool) -> Candidates:
    """By what can be told before the ranks meet: names, sizes, small files.

    A run's own checkpoints come before `checkpoint.load`, so that the same command again never
    throws its progress away. An evaluation is of the checkpoint that is named, and with
    `checkpoint.resume=none` of the student as it comes.

    Raises:
        ConfigError: there is none such, or there is one that must not be.
        CheckpointError: the one that is named, or every one, is damaged.
    """
    options, own = config.checkpoint, files.complete(config.run_dir)
    if not trains and options.load is not None:
        return _named(options.load)
    if options.resume == "none":
        if not trains:
            return Candidates([], [])
        if own:
            raise ConfigError(
                f"checkpoint.resume=none, but {own[-1]} is there, and a run from the start would "
                f"write over it. Use another run_dir, or checkpoint.resume=auto to go on."
            )
    elif options.resume != "auto":
        directory = files.checkpoint_dir(config.run_dir, options.resume)
        if directory not in own:
            there = ", ".join(path.name for path in own)
            raise ConfigError(
                f"checkpoint.resume={options.resume}: no complete {directory}. There are "
                f"{there or 'none'}."
            )
        return _named(directory)
    if own:
        return _sound(files.named(config.run_dir)[::-1])
    if options.load is not None:
        return _named(options.load)
    left = [f"{p}: never finished, it has no {files.DONE}." for p in files.named(config.run_dir)]
    return Candidates([], left)


def _named(directory: Path) -> Candidates:
    position = read_position(directory)
    problems = files.quick_problems(directory)
    if position.format > 1 and not (directory / files.CHECKSUMS).is_file():
        problems.append(f"{files.CHECKSUMS} is missing")
    if problems:
        raise CheckpointError(f"{directory} is damaged: {'; '.join(problems)}. Copy it again.")
    return Candidates([directory], [])


def _sound(newest_first: list[Path]) -> Candidates:
    candidates, damaged = Candidates([], []), []
    for directory in newest_first:
        try:
            _named(directory)
        except CheckpointError as error:
            if not candidates.directories:
                damaged.append(str(error))
        else:
            candidates.directories.append(directory)
    if not candidates.directories:
        raise CheckpointError(
            "every checkpoint of the run is damaged:\n"
            + "\n".join(damaged)
            + "\nTo begin anew use another run_dir."
        )
    first = candidates.directories[0]
    candidates.warnings.extend(f"{text} Going on from {first}." for text in damaged)
    return candidates


def first_sound(candidates: Candidates, context: ParallelContext, log: RunLog) -> Path | None:
    """By all of their content. Collective.

    Raises:
        CheckpointError: none is.
    """
    told = []
    for number, directory in enumerate(candidates.directories, start=1):
        problems = verify(directory, context)
        if not problems:
            return directory
        told.append(f"{directory} is damaged: {'; '.join(problems)}.")
        if number < len(candidates.directories):
            log.line(f"WARNING: {told[-1]} Going on from {candidates.directories[number]}.")
    if told:
        raise CheckpointError("\n".join([*told, "Copy it again, or use another run_dir."]))
    return None


def check_position(
    directory: Path,
    position: Position,
    prompts: PromptSet,
    tokenizer_digest: str,
    config: Config,
) -> None:
    """
    Raises:
        ConfigError: naming what differs, and what it would do.
    """
    different = []
    if position.seed != config.seed:
        different.append(f"seed={position.seed} (now {config.seed})")
    if position.prompts_digest != prompts.digest:
        different.append("other prompts")
    references = (position.references_digest, prompts.references_digest)
    if all(references) and references[0] != references[1]:
        different.append("other reference answers")
    if position.tokenizer_digest not in ("", tokenizer_digest):
        different.append(
            f"another tokenizer, {position.tokenizer_digest[:12]} (now {tokenizer_digest[:12]})"
        )
    if different:
        raise ConfigError(
            f"{directory} was written with {' and '.join(different)}: its samples could not be "
            f"continued. Use another run_dir, or the options of {config.run_dir}/config.json."
        )
    _check_teachers(directory, position, prompts, config)
    if position.iteration > config.training.train_iters:
        raise ConfigError(
            f"{directory} is at iteration {position.iteration}, past training.train_iters="
            f"{config.training.train_iters}. Raise it, or use another run_dir."
        )


def _check_teachers(
    directory: Path, position: Position, prompts: PromptSet, config: Config
) -> None:
    if position.teachers_digest != prompts.teachers_digest:
        raise ConfigError(
            f"{directory} was written by a run whose teachers read other prompts. Set "
            f"data.teacher_prompt_key, data.teacher_prompt_template, the teachers' prompt.* and "
            f"objective.teacher_mixture as they are in {config.run_dir}/config.json, with the "
            f"same lines in data.prompts; or use another run_dir."
        )
    if position.followers != config.followers:
        before, now = (
            ", ".join(f"{section}.{way}" for section, way in ways.items()) or "none"
            for ways in (position.followers, config.followers)
        )
        raise ConfigError(
            f"{directory}: teachers that follow the student were {before} there, and are {now} "
            f"now. What a teacher would be by now is not known: set these options as they were. To "
            f"begin anew from its weights, use another run_dir and student.hf_path={directory}."
        )


def check_schedules(directory: Path, position: Position, config: Config) -> None:
    """Raise ConfigError where another length of the run would make a schedule jump."""
    before, now = position.train_iters, config.training.train_iters
    if before is None or before == now or position.iteration == 0:
        return
    stretched = dict(_stretched(before, config))
    if stretched:
        raise ConfigError(
            f"{directory} is of a run of {before} iterations, and training.train_iters={now}: "
            f"{' and '.join(stretched)} would jump, moving over the whole run. Set "
            f"{' and '.join(stretched.values())} to go on as it began, or another length to choose "
            f"how."
        )


def _stretched(before: int, config: Config) -> Iterator[tuple[str, str]]:
    """(what moves over the whole run, the option that keeps its length)."""
    training, objective, rollout = config.training, config.objective, config.rollout
    if training.lr_decay_style != "constant" and training.lr_decay_iters is None:
        yield "the learning rate", f"training.lr_decay_iters={before}"
    moves = (objective.final_forward_kl_weight, objective.final_entropy_threshold)
    if moves != (None, None) and objective.schedule_steps is None:
        steps = before * config.optimizer_steps_per_iteration
        yield "the weight or threshold of forward KL", f"objective.schedule_steps={steps}"
    if rollout.final_reference_fraction is not None and rollout.reference_schedule_iters is None:
        yield "the share of references", f"rollout.reference_schedule_iters={before}"
