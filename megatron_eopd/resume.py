"""Which checkpoint a run goes on from, and whether it may. In: Config, prompts. Out: a directory.

A resumed run is the run that it would have been, so what its samples or schedules depend on must be
as it was; all other options may change, and are told.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_eopd import checkpoint
from megatron_eopd.checkpoint import Position
from megatron_eopd.config import Config
from megatron_eopd.data.prompts import PromptSet
from megatron_eopd.errors import ConfigError


def choose_checkpoint(config: Config, *, trains: bool) -> Path | None:
    """None: the run begins.

    A run's own checkpoints come before `checkpoint.load`, so that the same command again never
    throws its progress away. An evaluation is of the checkpoint that is named.

    Raises:
        ConfigError: there is none such, or there is one that must not be.
    """
    options, newest = config.checkpoint, checkpoint.newest(config.run_dir)
    if not trains:
        return options.load or newest
    if options.resume == "auto":
        return newest or options.load
    if options.resume == "none":
        if newest is not None:
            raise ConfigError(
                f"checkpoint.resume=none, but {newest} is there, and a run from the start would "
                f"write over it. Use another run_dir, or checkpoint.resume=auto to go on."
            )
        return options.load
    directory = checkpoint.checkpoint_dir(config.run_dir, options.resume)
    if not (directory / checkpoint.DONE).is_file():
        there = [path.name for path in checkpoint.complete(config.run_dir)]
        raise ConfigError(
            f"checkpoint.resume={options.resume}: no complete {directory}. There are "
            f"{', '.join(there) or 'none'}."
        )
    return directory


def check_position(directory: Path, position: Position, prompts: PromptSet, config: Config) -> None:
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
    if different:
        raise ConfigError(
            f"{directory} was written with {' and '.join(different)}: its samples could not be "
            f"continued. Use another run_dir, or the options of {config.run_dir}/config.json."
        )
    if position.iteration > config.training.train_iters:
        raise ConfigError(
            f"{directory} is at iteration {position.iteration}, past training.train_iters="
            f"{config.training.train_iters}. Raise it, or use another run_dir."
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
