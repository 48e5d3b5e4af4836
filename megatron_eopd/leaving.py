"""How the ranks of a job leave: after an error, or a stop, all together and with one word.

torchrun ends all ranks with the first that exits, and with --max-restarts starts them again.
"""

import sys
import threading
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron_eopd.errors import ExpectedError, disk_error, tell_torchrun
from megatron_eopd.interruption import EXIT_STOPPED
from megatron_eopd.parallel.collectives import lost_rank, tells_of_lost_rank
from megatron_eopd.parallel.init import ParallelContext, own_rank
from megatron_eopd.parallel.meeting import note_stop, stopped_before
from megatron_eopd.run_log import RunLog

TOGETHER = timedelta(seconds=15)


def as_expected(error: Exception, stage: str) -> ExpectedError | None:
    """What a user can act on, whatever raised it and wherever: a rank that is gone, a disk that
    takes no more. None of what is a fault of this project."""
    if isinstance(error, ExpectedError):
        return error
    if tells_of_lost_rank(error):
        return lost_rank(error, stage)
    return disk_error(error, stage)


def let_threads_be_quiet() -> None:
    """A library's thread that meets a full disk prints a traceback, and raises it once more on the
    thread that next has something for it; only that is told."""
    told = threading.excepthook

    def tell(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is None or as_expected(failure.exc_value, "") is None:
            told(failure)

    threading.excepthook = tell


def fail_together(error: Exception, log: RunLog, context: ParallelContext) -> NoReturn:
    """Tell the error once on the terminal, by rank 0, and exit. The others wait until rank 0 has
    spoken; a rank that failed alone speaks for itself."""
    rank = context.layout.rank
    tell_torchrun(f"error: {error}")
    if rank == 0:
        log.error(f"error: {error}")
    else:
        log.line(f"error: {error}")  # in its file alone
    try:
        dist.monitored_barrier(context.cpu_group, timeout=TOGETHER)
    except RuntimeError:
        if rank != 0:
            log.error(f"error on rank {rank}: {error}")
    sys.exit(1)


def stop_together(
    reason: str, log: RunLog, context: ParallelContext, job: dist.Store | None
) -> NoReturn:
    """`job`: torchrun's store, whose later starts are to end at once."""
    log.line(reason)
    tell_torchrun(reason)
    with suppress(RuntimeError):  # a rank is gone; what was to be saved is
        if job is not None:
            note_stop(job, reason)
        dist.monitored_barrier(context.cpu_group, timeout=TOGETHER)
    sys.exit(EXIT_STOPPED)


def leave_if_stopped(job: dist.Store | None) -> None:
    """torchrun starts ranks again whatever they end with, also those that were asked to."""
    reason = job and stopped_before(job)
    if reason:
        tell_torchrun(reason)
        if own_rank()[0] == 0:
            print(f"not started again: {reason}", flush=True)
        sys.exit(EXIT_STOPPED)
