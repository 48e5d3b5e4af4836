"""What is due between iterations: an evaluation, a checkpoint, an export. In: Session, Unfinished.

And what a stop leaves of an iteration, which is saved like the rest. All ranks call all of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_eopd.build import Session
from megatron_eopd.checkpoints.files import evaluation_dir
from megatron_eopd.checkpoints.position import make_position
from megatron_eopd.errors import Interrupted
from megatron_eopd.evaluation.evaluate import Evaluation, Evaluator
from megatron_eopd.evaluation.sample_file import Json
from megatron_eopd.evaluation.settings import model_identity
from megatron_eopd.metrics.writer import MetricsWriter, rounded
from megatron_eopd.reporting.lines import evaluation_line
from megatron_eopd.reporting.samples import samples_markdown
from megatron_eopd.run_files import RUN_CONFIG, export
from megatron_eopd.training.replicas import check_replicas
from megatron_eopd.unfinished import Unfinished, read_unfinished


def evaluate_if_due(session: Session, work: Unfinished, writer: MetricsWriter | None) -> None:
    config, iteration = session.config, work.iteration
    ends = (0, config.training.train_iters)
    due = iteration in ends or (
        config.evaluation.interval and iteration % config.evaluation.interval == 0
    )
    if not (due and session.problem_sets):
        return
    session.stop.pause("evaluation", until="evaluation", is_boundary=True)
    directory = evaluation_dir(config.run_dir, iteration)
    with session.stop.waiting("evaluation"):
        # Anew: what lies there may be of an iteration that was taken back since.
        result = evaluate_student(session, directory, model_of_run(session, iteration), anew=True)
    work.figures = {name: rounded(value) for name, value in result.figures.items()}
    for found in result.reports:
        session.log.line(f"eval {iteration} | {evaluation_line(found.task, found.figures)}")
    if writer is not None:
        writer.write(iteration, result.figures)
        shown = result.shown[: config.logging.text_samples]
        text = samples_markdown(
            [rollout for rollout, _ in shown], session.tokenizer, [mark for _, mark in shown]
        )
        writer.text(iteration, "evaluation", text)


def model_of_run(session: Session, iteration: int, steps_done: int = 0) -> Json:
    """What tells its weights from others."""
    student = model_identity(session.config.student.hf_path)["digest"]
    return {"iteration": iteration, "steps": steps_done, "student": student}


def evaluate_student(session: Session, directory: Path, model: Json, *, anew: bool) -> Evaluation:
    """With the weights that the engine was given last; see Evaluator.evaluate."""
    evaluator = Evaluator(
        config=session.config,
        context=session.context,
        log=session.log,
        tokenizer=session.tokenizer,
        engine=session.engine,
        engine_name=session.engine.name,
        chunks=session.chunks,
        teachers=session.teachers,
        token_loss=session.token_loss,
        checkpoint=session.resumed_from if session.student is None else None,
    )
    return evaluator.evaluate(session.problem_sets, directory, model, anew=anew)


def save_if_due(session: Session, work: Unfinished) -> bool:
    """Whether it was."""
    options = session.config.checkpoint
    is_last = work.iteration == session.config.training.train_iters
    is_due = is_last or work.iteration % options.save_interval == 0
    if work.iteration == 0 or not is_due:
        return False
    save(session, work)
    every = options.export_hf_interval
    if every and work.iteration % (every * options.save_interval) == 0:
        export(session, session.config.run_dir / f"hf-{work.iteration:06d}")
    if is_last:
        finish_save(session)
    return True


def finish_save(session: Session) -> None:
    """Wait for the one that is under way, however long after a signal."""
    with session.stop.saving():
        session.saver.finish()


def save(session: Session, work: Unfinished) -> None:
    """What is finished, and what there is of the iteration that is not."""
    config = session.config
    if config.training.check_replicas_interval:
        check_replicas(session.student, session.context)
    position = make_position(
        work.iteration,
        config.seed,
        session.prompts.digest,
        session.context,
        references_digest=session.prompts.references_digest,
        tokenizer_digest=session.tokenizer.digest,
        optimizer_steps=session.progress(work.iteration, work.steps_done).steps,
        train_iters=config.training.train_iters,
        is_evaluated=work.is_evaluated,
        steps_done=work.steps_done,
        figures=work.figures,
        grad_norms=session.guard.grad_norms,
        skipped_in_a_row=session.guard.skipped_in_a_row,
        followers=config.followers,
        teachers_digest=session.prompts.teachers_digest,
    )
    is_first = session.context.layout.rank == 0  # which writes them
    texts = work.files(config, session.tokenizer) if is_first else {}
    with session.stop.saving():
        session.saver.save(
            session.student,
            position,
            texts | {RUN_CONFIG: config.model_dump_json()},
            session.teachers.pieces_to_write(),
        )


def begun_work(session: Session, iteration: int) -> Unfinished:
    """What there is of an iteration: something only where the run was stopped within it."""
    resumed = session.resumed_from is not None and iteration == session.first_iteration
    if not (resumed and session.resumes_evaluated):
        return Unfinished(iteration, is_saved=resumed)
    return read_unfinished(session.resumed_from, iteration, session.config)


@contextmanager
def saved_when_interrupted(session: Session, work: Unfinished) -> Iterator[None]:
    """What the block has done when it is interrupted is saved, and nothing of it is done again."""
    try:
        yield
    except Interrupted as interruption:
        done = f"with {work.steps_done} optimizer steps of iteration {work.iteration} taken"
        with session.stop.saving():
            if not work.is_saved:
                session.log.line(f"{interruption}: saving")
                session.student.gather_parameters()
                save(session, work)
            finish_save(session)
        if (work.iteration, work.steps_done) == session.first_place:
            done += (
                ", as this start found it: where that happens again, give a job more time "
                "(checkpoint.exit_duration_minutes)"
            )
        raise Interrupted(f"{interruption}, and saved {done}") from None
