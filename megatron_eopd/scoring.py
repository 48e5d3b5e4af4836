"""Signals of rollouts that are on the disk. In: a run that kept its rollouts, both models. Out:
RUN_DIR/tokens/000120.npz, as training would have written it.

A forward pass of both models over some responses of an iteration, with the weights that wrote them:
those of a checkpoint, or of the student as it came.
"""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from megatron_eopd import launch
from megatron_eopd.build import Session
from megatron_eopd.checkpoints.files import checkpoint_dir
from megatron_eopd.config import Config, config_of
from megatron_eopd.data.packing import rounds_as_trained
from megatron_eopd.errors import ConfigError
from megatron_eopd.objectives import GATES
from megatron_eopd.parallel.collectives import from_rank_zero
from megatron_eopd.rollout.recording import rollout_file
from megatron_eopd.tokens.assemble import about, assemble
from megatron_eopd.tokens.file import write_tokens
from megatron_eopd.tokens.notes import TokenNotes, choose
from megatron_eopd.training.step import measure

SCORING = "scoring"
"""In a run's folder: the log of this work."""


def scoring_config(run_dir: Path, iteration: int, overrides: Sequence[str]) -> Config:
    """Of the run, but that nothing is sampled, evaluated or trained.

    Raises:
        ConfigError: there is no such run, or nothing of it to score.
    """
    path = run_dir / "config.json"
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the configuration of no run ({error}).") from None
    try:
        replay, folder = tree["rollout"]["replay"], run_dir / "rollouts"
    except (KeyError, TypeError):
        raise ConfigError(f"{path}: the configuration of no run of this version.") from None
    if replay is not None:
        raise ConfigError(
            f"{run_dir} trained on the rollouts of {replay}, which other weights wrote. Score them "
            "in the run that sampled them."
        )
    if not rollout_file(folder, iteration).is_file():
        raise ConfigError(
            f"{rollout_file(folder, iteration)}: no rollouts of iteration {iteration} were kept, "
            f"but {_listed(folder.glob('*.jsonl'))}. A run keeps them with rollout.record=true."
        )
    weights = checkpoint_dir(run_dir, iteration)
    if iteration and not weights.is_dir():
        raise ConfigError(
            f"{weights}: the weights that wrote the rollouts of iteration {iteration} are not "
            f"there; of iteration 0 they are the student as it came, and there are checkpoints "
            f"{_listed(weights.parent.glob('[0-9]*'))}."
        )
    tree["run_dir"] = str(run_dir / SCORING)
    tree["rollout"] |= {"replay": str(folder), "record": False, "engine": "auto"}
    tree["rollout"] |= {"placement": "colocated", "world_size": None, "num_engines": None}
    tree["evaluation"]["tasks"] = []
    tree["checkpoint"] |= {"load": str(weights) if iteration else None, "resume": "none"}
    tree["checkpoint"] |= {"keep_best": None}
    config = config_of(tree, overrides)
    _check_samples(config)
    return config


def _check_samples(config: Config) -> None:
    options, size = config.logging, config.rollout.batch_size
    if options.record_tokens_samples == 0:
        raise ConfigError(
            "logging.record_tokens_samples=0 scores nothing. Set it to the number of responses."
        )
    gate = config.objective.formula.gate
    if GATES[gate].needs_whole_step and options.record_tokens_samples < size:
        raise ConfigError(
            f"objective.gate={gate} finds its threshold among all tokens of an optimizer step, and "
            f"logging.record_tokens_samples={options.record_tokens_samples} are a part of them. "
            f"Set it to {size}, all responses of the iteration."
        )


def _listed(paths: Iterable[Path]) -> str:
    numbers = sorted(int(path.stem) for path in paths if path.stem.isdigit())
    return "of " + ", ".join(map(str, numbers)) if numbers else "none"


def score(config: Config, path: Path, iteration: int) -> None:
    """On every rank; writes the recording of this iteration to `path`."""
    launch.on_every_rank(config, partial(_score, path=path, iteration=iteration), trains=False)


def _score(session: Session, *, path: Path, iteration: int) -> None:
    config, context = session.config, session.context
    count = config.objective.max_trained_tokens
    rollouts = [r.first_tokens(count) for r in session.recording.read(iteration)]
    chosen = choose(rollouts, config.logging.record_tokens_samples)
    notes = TokenNotes(chosen)
    session.log.line(f"scoring {len(chosen)} of {len(rollouts)} responses of iteration {iteration}")
    rounds = rounds_as_trained(chosen, config, context.layout)
    microbatches = session.teachers.microbatches(rounds)
    measure(
        session.token_loss,
        session.chunks,
        microbatches,
        context,
        notes,
        progress=session.progress(iteration),
        compare_engine=True,
    )
    columns = notes.gather(context)

    def write() -> None:
        record = assemble(
            about(config, "training", iteration, columns),
            chosen,
            columns,
            session.tokenizer.piece,
            steps=[0] * len(chosen),
        )
        before = " in place of what was recorded there" if path.exists() else ""
        write_tokens(path, record)
        session.log.line(f"written to {path}{before}")

    from_rank_zero(write, context.cpu_group)
