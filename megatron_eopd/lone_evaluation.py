"""An evaluation alone. In: a Session that does not train. Out: the files of the evaluation."""

from collections.abc import Callable
from pathlib import Path

from megatron_eopd.build import Session
from megatron_eopd.checkpoints.files import EVALUATIONS, checkpoint_dir, evaluation_dir
from megatron_eopd.config import Config
from megatron_eopd.evaluation.evaluate import Evaluation
from megatron_eopd.evaluation.settings import model_identity
from megatron_eopd.loop import push_first_weights
from megatron_eopd.metrics.sinks.choice import open_sinks
from megatron_eopd.milestones import evaluate_student, model_of_run
from megatron_eopd.reporting.scalars import memory_scalars
from megatron_eopd.run_log import gauge_of, seconds_since_start


def into(output: Path | None) -> Callable[[Session], None]:
    """`output`: None for where a run has its evaluations."""

    def evaluate(session: Session) -> None:
        push_first_weights(session)
        session.log.stage = "evaluation"
        source = session.resumed_from
        directory, is_of_run = output or _directory(session), output is None and _is_own(session)
        if is_of_run:
            model = model_of_run(session, *session.first_place)
        else:
            model = model_identity(source or session.config.student.hf_path)
        result = evaluate_student(session, directory, model, anew=False)
        peaks = {"": gauge_of(session.context.device).take_peak()}
        memory = memory_scalars(peaks, session.context)
        if session.context.layout.rank == 0:
            told = ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
            session.log.line(
                f"\n{(directory / 'report.md').read_text()}\n{told} of the fullest rank; "
                f"{seconds_since_start():.0f} s; written to {directory}"
            )
            if is_of_run and _has_tensorboard(session.config):
                _show(session, result)

    return evaluate


def _is_own(session: Session) -> bool:
    """Whether the weights are the run's, at the iteration where it stands."""
    source = session.resumed_from
    own = checkpoint_dir(session.config.run_dir, *session.first_place)
    return source is None or source.resolve() == own.resolve()


def _directory(session: Session) -> Path:
    if _is_own(session):
        return evaluation_dir(session.config.run_dir, *session.first_place)
    source = session.resumed_from.resolve()
    return session.config.run_dir / EVALUATIONS / f"{source.parents[1].name}-{source.name}"


def _has_tensorboard(config: Config) -> bool:
    return "tensorboard" in config.logging.trackers and (config.run_dir / "tensorboard").is_dir()


def _show(session: Session, result: Evaluation) -> None:
    """Beside the curves of the run that the figures belong to, which may still go on: of the
    trackers, TensorBoard alone lets two write of one run."""
    (sink,) = open_sinks(["tensorboard"], session.config.run_dir, None, session.log.line)
    sink.write(session.first_iteration, result.figures, {})
    sink.close(is_complete=False)
