"""The loop of a run. In: a Session, on every rank. Out: a distilled student in it.

It is the chain of records written down: prompts ─▶ rollouts ─▶ scored rollouts ─▶ microbatches ─▶
step reports ─▶ new weights in the engine.
"""

from collections.abc import Iterator
from contextlib import closing, nullcontext
from itertools import count, islice

from megatron_eopd.build import Session
from megatron_eopd.data.packing import Limits, PackedRollouts, exchange_size, pack, rounds_of
from megatron_eopd.errors import EngineError
from megatron_eopd.health import HealthCheck
from megatron_eopd.metrics.writer import MetricsWriter
from megatron_eopd.milestones import (
    begun_work,
    evaluate_if_due,
    finish_save,
    save,
    save_if_due,
    saved_when_interrupted,
)
from megatron_eopd.records import MicroBatch, Prompt, Rollout
from megatron_eopd.reporting.scalars import iteration_scalars, memory_scalars, packing_scalars
from megatron_eopd.rollout.engine import Sampling, SyncReport
from megatron_eopd.rollout.recording import rollout_file, write_rollouts
from megatron_eopd.rollout.references import (
    places_of_references,
    reference_fraction_at,
    reference_rollouts,
)
from megatron_eopd.run_files import finish, open_files, publish
from megatron_eopd.run_log import StageTimes, gauge_of
from megatron_eopd.step_faults import settle
from megatron_eopd.token_recorder import TokenRecorder
from megatron_eopd.training.step import train_step
from megatron_eopd.unfinished import Unfinished


def train(session: Session) -> None:
    """All iterations, then the export and the report. Every rank of the student calls this."""
    writer = open_files(session)
    # However it ends: what a tracker has not written is a hole in the curves of the resumed run.
    with nullcontext() if writer is None else closing(writer):
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
    push_first_weights(session)
    health = HealthCheck(config, log)
    session.stop.begin_work()
    with log.progress(session.first_iteration, config.training.train_iters) as bar:
        for iteration in range(session.first_iteration, config.training.train_iters + 1):
            work = begun_work(session, iteration)
            with saved_when_interrupted(session, work):
                if iteration > done:
                    evaluate_if_due(session, work, writer)
                    work.is_evaluated = True
                    work.is_saved = save_if_due(session, work)
                if iteration == config.training.train_iters:
                    break
                times = stage_times(session, iteration)
                session.stop.pause("begin", is_boundary=work.rollouts is None)
                if work.rollouts is None:
                    with times("rollout"):
                        work.add_rollouts(draw_rollouts(session, iteration))
                trained = trained_on(session, work.rollouts)
                plans = plan_steps(session, trained)
                with session.engine.asleep():
                    optimize(session, trained, plans, work, times)
            with saved_when_interrupted(session, work):
                finish_iteration(session, work, plans, times, health, writer)
            bar.update()


def finish_iteration(
    session: Session,
    work: Unfinished,
    plans: list[PackedRollouts],
    times: StageTimes,
    health: HealthCheck,
    writer: MetricsWriter | None,
) -> None:
    """Give the engine the new weights, and tell what the iteration was."""
    version, rollouts, reports = work.iteration + 1, work.rollouts, work.reports
    with times("sync"), session.stop.waiting("sync"):
        sync = session.push_weights(version, rollouts)
    memory = memory_scalars(times.peaks, session.context)
    if writer is not None:  # the other ranks would count repetitions for nobody
        scalars = iteration_scalars(rollouts, reports, sync, times, memory)
        scalars |= packing_scalars(plans, session.context.layout)
        scalars |= session.engine.metrics()
        publish(session, version, scalars, rollouts, reports, writer)
        health.look(scalars, sync)
    if sync.is_unsound:  # the trainer's own weights are good
        save(session, Unfinished(version))
        finish_save(session)
        raise EngineError(sync.probe.message)
    session.saver.poll()
    session.stop.end_iteration(session.saver.whole_save_s)


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
    return StageTimes(session.log, where, gauge_of(session.context.device))


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
    with session.stop.waiting("rollout"):
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


def trained_on(session: Session, rollouts: list[Rollout]) -> list[Rollout]:
    """As far as the objective reads them."""
    count = session.config.objective.max_trained_tokens
    return [rollout.first_tokens(count) for rollout in rollouts]


def plan_steps(session: Session, rollouts: list[Rollout]) -> list[PackedRollouts]:
    """The optimizer steps of one iteration: which rank trains on which rollouts, and when."""
    training, layout = session.config.training, session.context.layout
    size, limits = training.global_batch_size, Limits.of(training)
    return [pack(rollouts[n : n + size], limits, layout) for n in range(0, len(rollouts), size)]


def optimize(
    session: Session,
    rollouts: list[Rollout],
    plans: list[PackedRollouts],
    work: Unfinished,
    times: StageTimes,
) -> None:
    """Score and train, step by step, those that were not taken before."""
    config, iteration, first = session.config, work.iteration, work.steps_done
    session.stop.pause("rollouts")
    rounds = [rounds_of(plan, exchange_size(config)) for plan in plans[first:]]
    # All steps at once: a teacher on its own ranks goes on while the student trains.
    all_rounds = [portion for step in rounds for portion in step]
    scored = times.each("score", session.teachers.microbatches(all_rounds, times))
    recorder = TokenRecorder(session, iteration, rollouts, first)
    every = config.logging.diagnostics_interval
    is_diagnosed = every > 0 and iteration % every == 0
    for number, own_rounds in enumerate(rounds, start=first):
        progress = session.progress(iteration, number)
        interval = config.training.check_replicas_interval
        with times("train"):
            step_report = train_step(
                session.student,
                session.token_loss,
                pausing(session, islice(scored, len(own_rounds)), number),
                session.context,
                num_rounds=len(own_rounds),
                progress=progress,
                # Only here does the student still have the weights that wrote the rollouts.
                compare_engine=number == 0,
                diagnose=is_diagnosed and number == 0,
                compare_replicas=interval > 0 and progress.steps % interval == 0,
                skip_above=session.guard.skip_above(),
                notes=recorder.notes(number),
                around_update=session.teachers.following(session.student, progress.steps + 1),
            )
        with times("record"):
            recorder.finish_step(number)
        batch = [r for rank in plans[number] for part in rank for r in part]
        settle(session, iteration, number, batch, step_report)
        work.add_step(step_report)
        session.stop.pause(f"step {number}")
    session.student.gather_parameters()


def pausing(
    session: Session, rounds: Iterator[list[MicroBatch]], step: int
) -> Iterator[list[MicroBatch]]:
    """The same rounds. A step that is broken off between them leaves no trace."""
    numbers = count()
    for microbatches in rounds:
        session.stop.pause(f"step {step} round {next(numbers)}", until=f"step {step}")
        yield microbatches
        # While the next ones are scored, the payloads of these must be gone; enumerate would hold
        # on to them, too.
        del microbatches
