"""What a run leaves beside its checkpoints: where it came from, metrics, export, report."""

import json
import subprocess
from pathlib import Path

from megatron_eopd.build import Session
from megatron_eopd.checkpoints import files
from megatron_eopd.config import Config, changed_options
from megatron_eopd.engines import make_exporter
from megatron_eopd.metrics.writer import MetricsWriter, simple_options
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.records import Rollout, StepReport
from megatron_eopd.reporting.lines import step_line
from megatron_eopd.reporting.run_report import finish_report
from megatron_eopd.reporting.samples import samples_markdown
from megatron_eopd.reporting.scalars import histograms, num_tokens
from megatron_eopd.run_log import seconds_since_start
from megatron_eopd.tokens.file import TOKENS

RUN_CONFIG = "run_config.json"
"""In a checkpoint: the options of the run that wrote it."""

_KINDS = {files.EVALUATIONS: "evaluation", TOKENS: "recording of tokens"}
"""By the folder in RUN_DIR."""


def open_files(session: Session) -> MetricsWriter | None:
    """The files of the run, on rank 0."""
    if session.context.layout.rank != 0:
        return None
    _tell_changes(session)
    config = session.config
    for moved in files.set_aside_later(config.run_dir, session.first_place):
        what = _KINDS.get(moved.parent.name, "checkpoint")
        session.log.line(f"WARNING: set aside a later {what}, {moved}")
    _save_provenance(config)
    return MetricsWriter(
        config.run_dir,
        session.first_iteration if session.resumed_from is not None else None,
        config.logging.trackers,
        is_evaluated=session.resumes_evaluated,
        options=simple_options(config.model_dump(mode="json")),
        tell=session.log.line,
    )


def _tell_changes(session: Session) -> None:
    """A resumed run may have other options, but never in silence."""
    if session.resumed_from is None:
        return
    saved = session.resumed_from / RUN_CONFIG
    if not saved.is_file():  # from before checkpoints had one
        saved = session.resumed_from.parents[1] / "config.json"
    if saved.is_file():
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


def publish(
    session: Session,
    iteration: int,
    scalars: dict[str, float],
    rollouts: list[Rollout],
    reports: list[StepReport],
    writer: MetricsWriter,
) -> None:
    """Metrics, some responses as text, and the step line; by rank 0."""
    config, log = session.config, session.log
    scalars["throughput/tokens_total"] = writer.tokens_total + num_tokens(rollouts)
    writer.write(iteration, scalars, histograms(reports))
    if iteration % config.logging.text_interval == 0:
        shown = rollouts[: config.logging.text_samples]
        writer.text(iteration, "rollouts", samples_markdown(shown, session.tokenizer))
    if iteration % config.logging.log_interval == 0:
        remaining_s = log.remaining_s(iteration, config.training.train_iters)
        log.line(step_line(iteration, config.training.train_iters, scalars, remaining_s))


def export(session: Session, directory: Path) -> None:
    """The student in Hugging Face's format. Collective."""
    config = session.config
    # All of the student's columns, also those that no token uses.
    columns = read_hf_config(config.student.hf_path).vocab_size
    exporter = make_exporter(config, session.student.chunks, columns, session.context)
    exporter.save_hf(config.student.hf_path, directory)


def finish(session: Session, writer: MetricsWriter | None) -> None:
    """The export, which all ranks gather, and the report."""
    config = session.config
    if config.checkpoint.export_hf:
        export(session, config.run_dir / "hf")
    if writer is None:
        return
    writer.complete()
    hf_dir = config.run_dir / "hf" if config.checkpoint.export_hf else None
    minutes = seconds_since_start() / 60
    session.log.line("\n" + finish_report(config, hf_dir, minutes))
