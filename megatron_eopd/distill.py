"""The loop of a run. In: a Session, on every rank. Out: a distilled student in it.

It is the chain of records written down: prompts ─▶ rollouts ─▶ scored rollouts ─▶ microbatches ─▶
step reports ─▶ new weights in the engine.
"""

from itertools import islice

from megatron_eopd import checkpoint, report
from megatron_eopd.config import ConfigError
from megatron_eopd.data.packing import Limits, PackedRollouts, pack, rounds_of
from megatron_eopd.evaluation.evaluate import Evaluation, evaluate
from megatron_eopd.metrics import MetricsWriter
from megatron_eopd.records import Rollout, StepReport
from megatron_eopd.rollout.engine import Sampling
from megatron_eopd.rollout.recording import read_rollouts, rollout_file, write_rollouts
from megatron_eopd.run_log import StageTimes
from megatron_eopd.session import Session
from megatron_eopd.training.step import NonFiniteError, train_step


def train(session: Session, writer: MetricsWriter | None) -> None:
    """All iterations. Runs once more than it trains, so that the last evaluation and checkpoint
    take the same path as all others."""
    config, log = session.config, session.log
    sync = session.push_weights(version=session.first_iteration)
    log.line(f"weights pushed to the engine in {sync.seconds:.2f} s")
    with log.progress(session.first_iteration, config.training.train_iters) as bar:
        for iteration in range(session.first_iteration, config.training.train_iters + 1):
            # A run that resumes here did both before it stopped.
            if iteration == 0 or iteration > session.first_iteration:
                evaluate_if_due(session, iteration, writer)
                save_if_due(session, iteration)
            if iteration == config.training.train_iters:
                break
            times = stage_times(session, iteration)
            with times("rollout"):
                rollouts = draw_rollouts(session, iteration)
            plans = plan_steps(session, rollouts)
            reports = train_on(session, plans, iteration, times)
            with times("sync"):
                sync = session.push_weights(version=iteration + 1)
            scalars = report.iteration_scalars(rollouts, reports, sync, times)
            scalars |= report.packing_scalars(plans, session.context.layout)
            publish(session, iteration + 1, scalars, rollouts, reports, writer)
            bar.update()


def stage_times(session: Session, iteration: int) -> StageTimes:
    layout = session.context.layout
    session.log.stage = f"iteration {iteration}"
    where = f"iteration {iteration} on rank {layout.rank} ({layout.place()})"
    return StageTimes(session.log, where)


def draw_rollouts(session: Session, iteration: int) -> list[Rollout]:
    """The student's responses of this iteration: sampled, or read from a recording."""
    config = session.config
    rollout = config.rollout
    if rollout.replay is not None:
        rollouts = read_rollouts(rollout_file(rollout.replay, iteration))
        if len(rollouts) != rollout.batch_size:
            raise ConfigError(
                f"{rollout_file(rollout.replay, iteration)} holds {len(rollouts)} rollouts. Set "
                f"rollout.batch_size={len(rollouts)} (it is {rollout.batch_size})."
            )
        return rollouts
    rollouts = session.engine.generate(
        session.prompts.batch(iteration, rollout.batch_size // rollout.samples_per_prompt),
        Sampling(
            samples_per_prompt=rollout.samples_per_prompt,
            temperature=rollout.temperature,
            max_response_length=rollout.max_response_length,
            stop_ids=session.tokenizer.stop_ids,
            seed=hash((config.seed, iteration)),
        ),
    )
    for sample in rollouts:
        assert sample.weight_version == iteration, (
            f"rollout from weight version {sample.weight_version} in iteration {iteration}"
        )
    if rollout.record and session.context.layout.rank == 0:
        path = rollout_file(config.run_dir / "rollouts", iteration)
        write_rollouts(path, rollouts, session.tokenizer)
    return rollouts


def plan_steps(session: Session, rollouts: list[Rollout]) -> list[PackedRollouts]:
    """The optimizer steps of one iteration: which rank trains on which rollouts, and when."""
    training, layout = session.config.training, session.context.layout
    size, limits = training.global_batch_size, Limits.of(training)
    return [pack(rollouts[n : n + size], limits, layout) for n in range(0, len(rollouts), size)]


def train_on(
    session: Session, plans: list[PackedRollouts], iteration: int, times: StageTimes
) -> list[StepReport]:
    """Score and train, step by step."""
    config = session.config
    rounds = [rounds_of(plan, config.exchange_size) for plan in plans]
    # All steps at once: a teacher on its own ranks goes on while the student trains.
    all_rounds = [portion for step in rounds for portion in step]
    scored = times.each("score", session.teachers.microbatches(all_rounds))
    reports = []
    for number, own_rounds in enumerate(rounds):
        try:
            with times("train"):
                step_report = train_step(
                    session.student,
                    session.token_loss,
                    islice(scored, len(own_rounds)),
                    session.context,
                    num_rounds=len(own_rounds),
                    step=iteration * config.optimizer_steps_per_iteration + number,
                    # Only here does the student still have the weights that wrote the rollouts.
                    compare_engine=number == 0,
                )
        except NonFiniteError:
            if session.context.layout.rank == 0:
                path = config.run_dir / "rollouts" / f"{iteration:06d}-nonfinite.jsonl"
                step = [r for rank in plans[number] for batch in rank for r in batch]
                write_rollouts(path, step, session.tokenizer)
            raise
        reports.append(step_report)
    session.student.gather_parameters()
    return reports


def publish(
    session: Session,
    iteration: int,
    scalars: dict[str, float],
    rollouts: list[Rollout],
    reports: list[StepReport],
    writer: MetricsWriter | None,
) -> None:
    """Files, the step line, and a warning if engine and trainer drift apart."""
    config, log = session.config, session.log
    if writer is not None:
        writer.write(iteration, scalars, report.histograms(reports))
        if iteration % config.logging.text_interval == 0:
            shown = rollouts[: config.logging.text_samples]
            writer.text(iteration, "rollouts", report.samples_markdown(shown, session.tokenizer))
    if iteration % config.logging.log_interval == 0:
        log.line(report.step_line(iteration, scalars))
    if scalars["mismatch/mult_prob_error"] > config.rollout.logprob_mismatch_limit:
        log.line(
            f"WARNING: engine and trainer disagree on the sampled tokens: mean exp|Δ| = "
            f"{scalars['mismatch/mult_prob_error']:.3f} > rollout.logprob_mismatch_limit="
            f"{config.rollout.logprob_mismatch_limit}"
        )


def evaluate_if_due(session: Session, iteration: int, writer: MetricsWriter | None) -> None:
    config = session.config
    ends = (0, config.training.train_iters)
    due = iteration in ends or (
        config.evaluation.interval and iteration % config.evaluation.interval == 0
    )
    if not (due and session.held_out):
        return
    result = evaluate_student(session)
    shown = " | ".join(f"{name.split('/')[-1]} {v:.3f}" for name, v in result.figures.items())
    session.log.line(f"eval {iteration} | {shown}")
    if writer is not None:
        writer.write(iteration, result.figures)
        first_of_each = result.samples[:: config.evaluation.samples_per_problem]
        shown = first_of_each[: config.logging.text_samples]
        writer.text(iteration, "evaluation", report.samples_markdown(shown, session.tokenizer))


def evaluate_student(session: Session) -> Evaluation:
    """The held-out problems, with the weights that the engine was given last."""
    return evaluate(
        session.held_out,
        session.engine,
        session.teachers,
        session.token_loss,
        session.student.chunks,
        session.tokenizer,
        session.config,
        session.context,
    )


def save_if_due(session: Session, iteration: int) -> None:
    config = session.config
    last = iteration == config.training.train_iters
    if iteration == 0 or not (last or iteration % config.checkpoint.save_interval == 0):
        return
    position = checkpoint.make_position(
        iteration, config.seed, session.prompts.digest, session.context
    )
    checkpoint.save(
        config.run_dir,
        session.student,
        position,
        hf_path=config.student.hf_path,
        keep_last=config.checkpoint.keep_last,
        context=session.context,
    )
