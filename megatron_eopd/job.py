"""A command's work on every rank: check, join the ranks, build, work, report, leave together."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megatron_eopd import distill, preflight, report
from megatron_eopd.config import Config, ConfigError, changed_options
from megatron_eopd.metrics import MetricsWriter, read_metrics
from megatron_eopd.models.hf_files import CheckpointError
from megatron_eopd.parallel.collectives import RemoteError
from megatron_eopd.parallel.init import ParallelContext, parallel_context
from megatron_eopd.rollout.engine import EngineError
from megatron_eopd.run_log import RunLog
from megatron_eopd.session import Session, open_session
from megatron_eopd.training.step import NonFiniteError

EXPECTED_ERRORS = (ConfigError, CheckpointError, EngineError, NonFiniteError, RemoteError)
"""What a user can act on; told without a traceback."""


def train(config: Config) -> None:
    """Train to the last iteration, export, report. Every rank of the job calls this."""
    begin = time.monotonic()
    with _session(config) as session:
        is_first = session.context.layout.rank == 0
        writer = None
        if is_first:
            _tell_changes(session)
            _save_provenance(config)
            writer = MetricsWriter(config.run_dir, resumed_at=session.first_iteration)
        distill.train(session, writer)
        if config.checkpoint.export_hf:
            session.exporter.save_hf(config.student.hf_path, config.run_dir / "hf")
        if writer is not None:
            writer.close()
            hf_dir = config.run_dir / "hf" if config.checkpoint.export_hf else None
            table = report.before_after_table(read_metrics(config.run_dir / "metrics.jsonl"))
            minutes = (time.monotonic() - begin) / 60
            session.log.line("\n" + report.write_report(config, table, hf_dir, minutes))


def evaluate(config: Config) -> None:
    """Evaluate the newest checkpoint of the run, or the student as it came where there is none."""
    if config.evaluation.task is None:
        raise ConfigError("evaluation.task is not set: nothing to evaluate on. Set countdown.")
    with _session(config) as session:
        session.push_weights(version=session.first_iteration)
        figures = distill.evaluate_student(session).figures
        if session.context.layout.rank == 0:
            path = config.run_dir / f"evaluation-{session.first_iteration:06d}.json"
            path.write_text(json.dumps(figures, indent=2) + "\n")
            session.log.line("\n" + report.figures_table(figures) + f"\n\nwritten to {path}")


def dry_run(config: Config, world_size: int | None) -> None:
    """Check as a run would, and print what it would do with this many ranks (default TP × PP)."""
    parallel = config.parallel
    smallest = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    inputs = preflight.check(config, world_size or smallest)
    print(config.model_dump_json(indent=2))
    numbers = preflight.derived_numbers(config, inputs, world_size or smallest)
    for name, value in numbers.items():
        print(f"{name}: {value}")


@contextmanager
def _session(config: Config) -> Iterator[Session]:
    """A session on the ranks of this job; an expected error ends all ranks together."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    inputs = preflight.check(config, world_size)
    with parallel_context(config.parallel, config.seed, config.longest_wait_s) as context:
        log = RunLog(config.run_dir, context.layout.rank)
        for name, value in preflight.derived_numbers(config, inputs, world_size).items():
            log.line(f"{name}: {value}")
        try:
            with open_session(config, inputs, context, log) as session:
                yield session
        except EXPECTED_ERRORS as error:
            _fail_together(error, log, context)
        log.close()


def _fail_together(error: Exception, log: RunLog, context: ParallelContext) -> NoReturn:
    """Tell the error once, by rank 0, and exit. torchrun ends all ranks with the first that exits,
    so the others wait until rank 0 has spoken; a rank that failed alone speaks for itself."""
    if context.layout.rank == 0:
        log.error(f"error: {error}")
    try:
        dist.monitored_barrier(context.cpu_group, timeout=timedelta(seconds=15))
    except RuntimeError:
        if context.layout.rank != 0:
            log.error(f"error on rank {context.layout.rank}: {error}")
    sys.exit(1)


def _tell_changes(session: Session) -> None:
    """A resumed run may have other options, but never in silence."""
    saved = session.config.run_dir / "config.json"
    if session.first_iteration > 0 and saved.is_file():
        new = json.loads(session.config.model_dump_json())
        for change in changed_options(json.loads(saved.read_text()), new):
            session.log.line(f"WARNING: resumed with a changed option, {change}")


def _save_provenance(config: Config) -> None:
    """The resolved configuration, and the state of the code if it is a git checkout."""
    (config.run_dir / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
    here = Path(__file__).resolve().parent
    for name, command in (("commit.txt", ["rev-parse", "HEAD"]), ("diff.patch", ["diff", "HEAD"])):
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *command], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return
        if done.returncode == 0:
            (config.run_dir / name).write_text(done.stdout)
