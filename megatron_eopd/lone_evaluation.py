"""An evaluation alone. In: a Session that does not train. Out: the files of the evaluation."""

from collections.abc import Callable
from pathlib import Path

from megatron_eopd.build import Session
from megatron_eopd.checkpoints.files import checkpoint_dir, evaluation_dir
from megatron_eopd.evaluation.evaluate import Evaluation
from megatron_eopd.evaluation.settings import model_identity
from megatron_eopd.loop import push_first_weights
from megatron_eopd.metrics.trackers import TRACKERS
from megatron_eopd.milestones import evaluate_student, model_of_run
from megatron_eopd.report import memory_scalars
from megatron_eopd.run_log import seconds_since_start


def into(output: Path | None) -> Callable[[Session], None]:
    """`output`: None for where a run has its evaluations."""

    def evaluate(session: Session) -> None:
        push_first_weights(session)
        run_dir, source = session.config.run_dir, session.resumed_from
        directory = output or evaluation_dir(run_dir, *session.first_place)
        if output is None and source in (None, checkpoint_dir(run_dir, *session.first_place)):
            model = model_of_run(session, *session.first_place)
        else:
            model = model_identity(source or session.config.student.hf_path)
        result = evaluate_student(session, directory, model, anew=False)
        if session.context.layout.rank == 0:
            ((name, gib),) = memory_scalars().items()
            session.log.line(
                f"\n{(directory / 'report.md').read_text()}\n{name}: {gib:.2f} on rank 0; "
                f"{seconds_since_start():.0f} s; written to {directory}"
            )
            if output is None and (run_dir / "tensorboard").is_dir():
                _show(session, result)

    return evaluate


def _show(session: Session, result: Evaluation) -> None:
    """Beside the curves of the run that the figures belong to, which may still go on."""
    for name in session.config.logging.trackers:
        tracker = TRACKERS[name](session.config.run_dir, None)
        tracker.scalars(session.first_iteration, result.figures)
        tracker.close()
