"""A command's work on every rank: check, join the ranks, build, work, leave together."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch.distributed as dist
from torch.distributed import PrefixStore

from megatron_eopd import preflight
from megatron_eopd.build import Session, open_session
from megatron_eopd.config import Config
from megatron_eopd.engines import serve_engines
from megatron_eopd.errors import Interrupted
from megatron_eopd.interruption import Interruption
from megatron_eopd.leaving import (
    as_expected,
    fail_together,
    leave_if_stopped,
    let_threads_be_quiet,
    stop_together,
)
from megatron_eopd.parallel.init import (
    ParallelContext,
    check_gpus,
    choose_deterministic_kernels,
    job_store,
    leave_no_process_behind,
    own_gpu,
    own_rank,
    world_context,
)
from megatron_eopd.parallel.meeting import began_at, torchrun_store
from megatron_eopd.parallel.worlds import (
    ENGINES,
    STUDENT,
    Role,
    roles_of,
    smallest_world,
    student_layout,
)
from megatron_eopd.rollout.placement import Places, assumed_nodes, own_node, places_of
from megatron_eopd.run_lock import run_lock
from megatron_eopd.run_log import RunLog, seconds_since_start
from megatron_eopd.stop_signals import StopSignals
from megatron_eopd.teacher.placement import rank_table, wire_store
from megatron_eopd.teacher.separate import serve
from megatron_eopd.teacher_check.check import check_teachers


def dry_run(config: Config, world_size: int | None, show_config: bool) -> None:
    """Check as a run would, and print what it would do with this many ranks (default: the fewest
    that the layouts allow)."""
    world_size = world_size or smallest_world(config)
    inputs = preflight.check(config, world_size)
    preflight.check_answers(config, inputs)
    for line in _plan(config, inputs, world_size):
        print(line)
    places = places_of(config, assumed_nodes(world_size)) if inputs.engine.is_vllm else None
    print(rank_table(config, world_size, engines=places and places.describe()))
    if show_config:
        print(config.model_dump_json(indent=2))


def on_every_rank(config: Config, work: Callable[[Session], None], *, trains: bool = True) -> None:
    """`work` on the student's ranks, while those of separate teachers serve them. `trains`: see
    preflight.check."""
    leave_no_process_behind()
    let_threads_be_quiet()
    job = torchrun_store()
    leave_if_stopped(job)
    if config.model.deterministic_mode:
        choose_deterministic_kernels()
    rank, world_size = own_rank()
    imports_s = seconds_since_start()
    inputs = preflight.check(config, world_size, trains=trains)
    if rank == 0:
        preflight.check_answers(config, inputs)
    checks_s = seconds_since_start() - imports_s
    # An evaluation reads, and may do so beside the run.
    with run_lock(config.run_dir) if trains and rank == 0 else nullcontext():
        if trains and rank == 0:  # whose choice is the others'
            inputs = preflight.with_checkpoints_of_now(config, inputs)
        startup = {"imports": imports_s, "checks": checks_s}
        _meet_and_work(config, work, inputs, rank, world_size, startup, job, trains=trains)


def _limit(config: Config, job: dist.Store | None) -> float | None:
    """When the job must be over, by time.monotonic(), as its first start counts."""
    minutes = config.checkpoint.exit_duration_minutes
    if minutes is None:
        return None
    now = time.time()
    began = now - seconds_since_start()
    return time.monotonic() + 60 * minutes - (now - (began_at(job, began) if job else began))


def _meet_and_work(
    config: Config,
    work: Callable[[Session], None],
    inputs: preflight.Inputs,
    rank: int,
    world_size: int,
    startup: dict[str, float],
    job: dist.Store | None,
    *,
    trains: bool,
) -> None:
    """`startup`: what was done until here, in seconds. `job`: torchrun's store, with what outlives
    this start."""
    roles = roles_of(config, world_size)
    role = next(role for role in roles.values() if role.holds(rank))
    store = job_store(config.parallel.distributed_timeout_minutes)
    store.set(f"host/{rank}", socket.gethostname())
    store.set(f"node/{rank}", str(own_node()))
    store.set(f"gpu/{rank}", own_gpu())
    nodes = [int(store.get(f"node/{other}")) for other in range(world_size)]
    check_gpus([store.get(f"gpu/{other}").decode() for other in range(world_size)])
    places = places_of(config, nodes) if inputs.engine.is_vllm else None
    limit = _limit(config, job)
    with _world(role, config, rank, store, job) as (context, log, signals):
        if trains:  # an evaluation may be beside a run whose they are
            log.keep_last_words()
        if role.name != STUDENT:
            log.stage = f"service as [{role.name}]"
        if role.name == ENGINES:
            joined = partial(_leave_to_student, signals)
            serve_engines(config, inputs, places, store, context, rank, joined)
            log.line("the student has finished, and these engines with it")
            return
        if role.name != STUDENT:
            _leave_to_student(signals)
            teacher = config.all_teachers[role.name]
            students = student_layout(config, world_size)
            serve(
                teacher,
                role,
                config,
                inputs.tokenizers.swaps[role.name],
                inputs.tokenizers.vocab_size,
                wire_store(store, role.name),
                students,
                context,
            )
            log.line("the student has finished, and this teacher with it")
            return
        if rank == 0:
            _tell_plan(config, inputs, world_size, places, store, log)
        log.startup |= startup
        stop = Interruption(signals, log, context.cpu_group, limit)
        with open_session(
            config, inputs, roles, places, store, context, log, stop, trains=trains
        ) as session:
            if trains:
                check_teachers(session, inputs.tokenizers)
            parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in log.startup.items())
            log.line(f"start-up: {seconds_since_start():.1f} s ({parts})")
            work(session)


def _leave_to_student(signals: StopSignals) -> None:
    """It lets these ranks go, when it has saved."""
    signals.keeps_work = signals.is_saving = True


@contextmanager
def _world(
    role: Role, config: Config, rank: int, store: dist.Store, job: dist.Store | None
) -> Iterator[tuple[ParallelContext, RunLog, StopSignals]]:
    """The ranks of one role. An expected error, or a stop, ends all of them together."""
    layout, minutes = role.layout(config, rank), config.parallel.distributed_timeout_minutes
    own = PrefixStore(role.name, store)
    with world_context(layout, own, minutes, config.seed, config.longest_wait_s) as context:
        log = RunLog(config.run_dir, rank)
        signals = StopSignals(log, config.checkpoint.exit_grace_seconds)
        try:
            yield context, log, signals
        except Interrupted as interruption:
            signals.ignore()
            stop_together(str(interruption), log, context, job)
        except Exception as error:
            expected = as_expected(error, log.stage)
            if expected is None:
                raise
            signals.ignore()
            fail_together(expected, log, context)
        signals.ignore()
        log.close()


def _plan(config: Config, inputs: preflight.Inputs, world_size: int) -> Iterator[str]:
    """What this run is."""
    numbers = preflight.derived_numbers if inputs.prompts else preflight.evaluation_numbers
    for name, value in numbers(config, inputs, world_size).items():
        yield f"{name}: {value}"
    yield preflight.preview(inputs)
    for warning in [*inputs.warnings, *inputs.candidates.warnings]:
        yield f"warning: {warning}"


def _tell_plan(
    config: Config,
    inputs: preflight.Inputs,
    world_size: int,
    places: Places | None,
    store: dist.Store,
    log: RunLog,
) -> None:
    """What this run is, and who sits where."""
    for line in _plan(config, inputs, world_size):
        log.line(line)
    hosts = [store.get(f"host/{rank}").decode() for rank in range(world_size)]
    table = rank_table(config, world_size, hosts, places and places.describe())
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "ranks.txt").write_text(table + "\n")
    log.line(table)
