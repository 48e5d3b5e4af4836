"""After each optimizer step: what a faulty one leaves, and whether the run goes on without it.

In: a StepReport, on every rank. Out: RUN_DIR/nonfinite/000012/ (or spikes/), which `rollout.replay`
takes: the step's batch, and state.json.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_eopd.build import Session
from megatron_eopd.errors import NonFiniteError, SpikeError
from megatron_eopd.parallel.collectives import from_rank_zero
from megatron_eopd.records import Rollout, StepReport
from megatron_eopd.rollout.recording import STATE_FILE, rollout_file, write_rollouts


def settle(
    session: Session, iteration: int, step: int, rollouts: Sequence[Rollout], report: StepReport
) -> None:
    """Take note of a step, and of its fault, if it has one.

    `step`: its number in the iteration. `rollouts`: of the step.

    Raises:
        NonFiniteError, SpikeError: on every rank, where the step must not be skipped.
    """
    guard, fault = session.guard, report.fault
    guard.note(report)
    if fault is None:
        return
    folder = dump_folder(session.config.run_dir, iteration, step, fault.kind)
    message = (
        f"iteration {iteration}, optimizer step {step} of it: {fault.message} Its rollouts and "
        f"state are in {folder}."
    )
    # All wait for it: torchrun stops the others as soon as one rank has ended.
    from_rank_zero(
        lambda: _dump(session, folder, iteration, step, rollouts, report),
        session.context.cpu_group,
    )
    reason = guard.reason_to_stop(fault)
    if reason:
        raise (SpikeError if fault.kind == "spike" else NonFiniteError)(f"{message} {reason}")
    most = session.config.training.max_skipped_steps
    session.log.line(
        f"WARNING: skipped, number {guard.skipped_in_a_row} in a row of at most {most}: {message}"
    )


def dump_folder(run_dir: Path, iteration: int, step: int, kind: str) -> Path:
    """The first step of an iteration has the iteration's name."""
    name = f"{iteration:06d}-{step}" if step else f"{iteration:06d}"
    return run_dir / ("spikes" if kind == "spike" else "nonfinite") / name


def _dump(
    session: Session,
    folder: Path,
    iteration: int,
    step: int,
    rollouts: Sequence[Rollout],
    report: StepReport,
) -> None:
    """A disk that is full is no reason to lose the run, nor the message."""
    state = _state(session, folder, iteration, step, report)
    try:
        write_rollouts(rollout_file(folder, iteration), rollouts, session.tokenizer)
        (folder / STATE_FILE).write_text(json.dumps(_plain(state), indent=2) + "\n")
    except OSError as error:
        session.log.line(f"WARNING: {folder} could not be written ({error}).")


def _state(
    session: Session, folder: Path, iteration: int, step: int, report: StepReport
) -> dict[str, Any]:
    config, layout = session.config, session.context.layout
    commit = config.run_dir / "commit.txt"
    size = config.training.global_batch_size
    return {
        "iteration": iteration,
        "step_of_iteration": step,
        "optimizer_step": session.progress(iteration, step).steps,
        "fault": report.fault.kind,
        "message": report.fault.message,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "recent_grad_norms": session.guard.grad_norms,
        "sums_and_counts": report.sums,
        **report.fault.figures,
        "layout": {name: x for name, x in asdict(layout).items() if name != "rank"},
        "commit": commit.read_text().strip() if commit.is_file() else None,
        "config_sha256": hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
        "replay": f"rollout.replay={folder} rollout.batch_size={size} rollout.samples_per_prompt=1 "
        f"training.global_batch_size={size} training.train_iters=1",
    }


def _plain(value: Any) -> Any:
    """With words for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
