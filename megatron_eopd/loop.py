"""The loop of a run. In: a Session, on every rank. Out: a distilled student in it.

It is the chain of records written down: prompts ─▶ rollouts ─▶ scored rollouts ─▶ microbatches ─▶
step reports ─▶ new weights in the engine.
"""

import json
from itertools import islice

from megatron_eopd import checkpoint, report
from megatron_eopd.build import Session
from megatron_eopd.data.packing import Limits, PackedRollouts, exchange_size, pack, rounds_of
from megatron_eopd.errors import EngineError, NonFiniteError
from megatron_eopd.evaluation.evaluate import Evaluation, evaluate_on
from megatron_eopd.health import HealthCheck
from megatron_eopd.metrics.writer import MetricsWriter, rounded
from megatron_eopd.records import Prompt, Rollout, StepReport
from megatron_eopd.rollout.engine import Sampling, SyncReport
from megatron_eopd.rollout.recording import rollout_file, write_rollouts
from megatron_eopd.rollout.references import (
    places_of_references,
    reference_fraction_at,
    reference_rollouts,
)
from megatron_eopd.run_files import finish, open_files, publish
from megatron_eopd.run_log import StageTimes
from megatron_eopd.training.step import train_step


def train(session: Session) -> None:
    """All iterations, then the export and the report. Every rank of the student calls this."""
    writer = open_files(session)
    iterate(session, writer)
    finish(session, writer)


def iterate(session: Session, writer: MetricsWriter | None) -> None:
    """Runs once more than it trains, so that the last evaluation and checkpoint take the same path
    as all others."""
    config, log = session.config, session.log
    # A run that resumes has made the evaluation and the checkpoint that are due where it stopped.
    done = session.first_iteration if session.resumes_evaluated else -1
    if config.training.train_iters == done:
        return
    sync = push_first_weights(session)
    health = HealthCheck(config, log)
    with log.progress(session.first_iteration, config.training.train_iters) as bar:
        for iteration in range(session.first_iteration, config.training.train_iters + 1):
            if iteration > done:
                evaluate_if_due(session, iteration, writer)
                save_if_due(session, iteration)
            if iteration == config.training.train_iters:
                break
            times = stage_times(session, iteration)
            with times("rollout"):
                rollouts = draw_rollouts(session, iteration)
            plans = plan_steps(session, rollouts)
            reports = optimize(session, plans, iteration, times)
            with times("sync"):
                sync = session.push_weights(iteration + 1, rollouts)
            scalars = report.iteration_scalars(rollouts, reports, sync, times)
            scalars |= report.packing_scalars(plans, session.context.layout)
            publish(session, iteration + 1, scalars, rollouts, reports, writer)
            health.look(scalars, sync)
            if sync.is_unsound:  # the trainer's own weights are good
                save(session, iteration + 1, is_evaluated=False)
                raise EngineError(sync.probe.message)
            bar.update()


def push_first_weights(session: Session) -> SyncReport:
    """
    Raises:
        EngineError: the engine does not hold them.
    """
    sync = session.push_weights(version=session.first_iteration)
    session.log.line(f"weights pushed to the engine in {sync.seconds:.2f} s")
    if sync.is_unsound:
        raise EngineError(sync.probe.message)
    if sync.probe is not None and sync.probe.message:
        session.log.line(f"WARNING: {sync.probe.message}")
    return sync


def stage_times(session: Session, iteration: int) -> StageTimes:
    layout = session.context.layout
    session.log.stage = f"iteration {iteration}"
    where = f"iteration {iteration} on rank {layout.rank} ({layout.place()})"
    return StageTimes(session.log, where)


def draw_rollouts(session: Session, iteration: int) -> list[Rollout]:
    """The responses of this iteration: sampled, reference answers, or read from a recording."""
    config = session.config
    if session.recording is not None:
        return session.recording.read(iteration)
    count = config.rollout.samples_per_prompt
    prompts = session.prompts.batch(iteration, config.rollout.batch_size // count)
    fraction = reference_fraction_at(config.rollout, session.progress(iteration))
    answered = places_of_references(len(prompts), fraction, config.seed, iteration)
    open_prompts = [p for n, p in enumerate(prompts) if n not in answered]
    given_prompts = [p for n, p in enumerate(prompts) if n in answered]
    sampled = iter(sample(session, open_prompts, iteration))
    given = iter(reference_rollouts(given_prompts, session.prompts, count, version=iteration))
    # In the prompts' order, so that both are spread over the optimizer steps.
    places = [n for n in range(len(prompts)) for _ in range(count)]
    rollouts = [next(given if n in answered else sampled) for n in places]
    if config.rollout.record and session.context.layout.rank == 0:
        path = rollout_file(config.run_dir / "rollouts", iteration)
        write_rollouts(path, rollouts, session.tokenizer)
    return rollouts


def sample(session: Session, prompts: list[Prompt], iteration: int) -> list[Rollout]:
    """The student's responses, by the weights of this iteration."""
    config = session.config
    if not prompts:
        return []
    rollouts = session.engine.generate(
        prompts,
        Sampling(
            samples_per_prompt=config.rollout.samples_per_prompt,
            temperature=config.rollout.temperature,
            max_response_length=config.rollout.max_response_length,
            stop_ids=session.tokenizer.stop_ids,
            seed=hash((config.seed, iteration)),
        ),
    )
    for rollout in rollouts:
        assert rollout.weight_version == iteration, (
            f"rollout from weight version {rollout.weight_version} in iteration {iteration}"
        )
    return rollouts


def plan_steps(session: Session, rollouts: list[Rollout]) -> list[PackedRollouts]:
    """The optimizer steps of one iteration: which rank trains on which rollouts, and when."""
    training, layout = session.config.training, session.context.layout
    size, limits = training.global_batch_size, Limits.of(training)
    return [pack(rollouts[n : n + size], limits, layout) for n in range(0, len(rollouts), size)]


def optimize(
    session: Session, plans: list[PackedRollouts], iteration: int, times: StageTimes
) -> list[StepReport]:
    """Score and train, step by step."""
    config = session.config
    rounds = [rounds_of(plan, exchange_size(config)) for plan in plans]
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
                    progress=session.progress(iteration, number),
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


def evaluate_if_due(session: Session, iteration: int, writer: MetricsWriter | None) -> None:
    config = session.config
    ends = (0, config.training.train_iters)
    due = iteration in ends or (
        config.evaluation.interval and iteration % config.evaluation.interval == 0
    )
    if not (due and session.held_out):
        return
    result = evaluate_student(session)
    figures = " | ".join(f"{name.split('/')[-1]} {v:.3f}" for name, v in result.figures.items())
    session.log.line(f"eval {iteration} | {figures}")
    if writer is not None:
        writer.write(iteration, result.figures)
        each, count = config.evaluation.samples_per_problem, config.logging.text_samples
        shown, marks = result.samples[::each][:count], result.correct[::each][:count]
        text = report.samples_markdown(shown, session.tokenizer, marks)
        writer.text(iteration, "evaluation", text)


def evaluate_student(session: Session) -> Evaluation:
    """The held-out problems, with the weights that the engine was given last."""
    return evaluate_on(
        session.held_out,
        session.engine,
        session.teachers,
        session.token_loss,
        session.student.chunks,
        session.tokenizer,
        session.config,
        session.context,
    )


def evaluate(session: Session) -> None:
    """An evaluation alone, of the checkpoint that was loaded, into a file of its own."""
    push_first_weights(session)
    figures = {n: rounded(v) for n, v in evaluate_student(session).figures.items()}
    if session.context.layout.rank == 0:
        path = session.config.run_dir / f"evaluation-{session.first_iteration:06d}.json"
        path.write_text(json.dumps(figures, indent=2) + "\n")
        session.log.line("\n" + report.figures_table(figures) + f"\n\nwritten to {path}")


def save_if_due(session: Session, iteration: int) -> None:
    config = session.config
    last = iteration == config.training.train_iters
    if iteration > 0 and (last or iteration % config.checkpoint.save_interval == 0):
        save(session, iteration)


def save(session: Session, iteration: int, is_evaluated: bool = True) -> None:
    config = session.config
    position = checkpoint.make_position(
        iteration,
        config.seed,
        session.prompts.digest,
        session.context,
        references_digest=session.prompts.references_digest,
        optimizer_steps=session.progress(iteration).steps,
        train_iters=config.training.train_iters,
        is_evaluated=is_evaluated,
    )
    checkpoint.save(
        config.run_dir,
        session.student,
        position,
        hf_path=config.student.hf_path,
        keep_last=config.checkpoint.keep_last,
        context=session.context,
    )
