"""The process that grades, and the one that replaces it. In: GradeRequests on a pipe. Out: one
GradeReply to each.

    pool ─▶ keeper, which has imported everything ─▶ grader, a fork of it, that reads the pipe

A grader may be killed at any instruction, by the kernel: when it has used its processor time, in C
code too, or its memory. The keeper then answers in its place and forks the next, in milliseconds.
"""

import argparse
import gc
import importlib
import mmap
import os
import pickle
import resource
import signal
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NoReturn

from megatron_eopd.evaluation.grading_messages import GradeReply, GradeRequest, Limits
from megatron_eopd.parallel.processes import die_with
from megatron_eopd.tasks.task import Grade, Verdict

RENEWED_AFTER = 2_000
"""Requests that one grader answers; the caches of what it calls grow."""


_PAGE = resource.getpagesize()
_STOPPED, _RENEW = 70, 71
"""How a grader exits by itself: for good, or to be replaced. Neither owes a reply."""
_SIGNALS_OF_LIMITS = (signal.SIGPROF, signal.SIGALRM, signal.SIGKILL)
"""Processor time, time, and the memory of the machine."""
_MANY_IDLE_DEATHS = 20
"""In a row: then graders cannot run here at all."""


def keep(connection: Connection, limits: Limits) -> None:
    """Fork graders until the pool closes the pipe."""
    gc.collect()
    gc.freeze()  # so that graders share these pages
    current = mmap.mmap(-1, 8)  # shared: the number of the request that is being graded
    idle_deaths = 0
    while idle_deaths < _MANY_IDLE_DEATHS:
        current[:] = bytes(8)
        keeper = os.getpid()
        grader = os.fork()
        if grader == 0:
            die_with(keeper)
            _serve(connection, limits, current)
        _, status = os.waitpid(grader, 0)
        exit_code = os.waitstatus_to_exitcode(status)
        number = int.from_bytes(current[:], "little")
        if number:  # whatever the code: the task, too, may exit with one of these two
            connection.send(GradeReply(number, Grade(Verdict.TIMED_OUT, detail=_ending(exit_code))))
        elif exit_code == _STOPPED:
            return
        idle_deaths = 0 if exit_code == _RENEW or number else idle_deaths + 1


def _ending(exit_code: int) -> str:
    """Empty where it was a limit's."""
    if exit_code >= 0:
        return f"the grader process exited with code {exit_code}"
    number = -exit_code
    if number in _SIGNALS_OF_LIMITS:
        return ""
    return f"the grader process was killed by signal {number} ({signal.strsignal(number)})"


def _serve(connection: Connection, limits: Limits, current: mmap.mmap) -> NoReturn:
    try:
        _limit_itself(limits)
        for _ in range(RENEWED_AFTER):
            request: GradeRequest = connection.recv()
            current[:] = request.number.to_bytes(8, "little")
            reply = _answer(request, limits)
            connection.send(reply)
            current[:] = bytes(8)
            if reply.grade is None:
                break  # memory was short, and what is left may be in pieces
        os._exit(_RENEW)
    except (EOFError, OSError):  # the pool has closed the pipe
        os._exit(_STOPPED)
    finally:  # whatever was raised: the rest of this program is the keeper's
        traceback.print_exc()
        os._exit(1)


def _answer(request: GradeRequest, limits: Limits) -> GradeReply:
    try:
        task, answer, response = pickle.loads(request.payload)
        # No handler is set for these two signals: the kernel ends the process, whatever it does.
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
        signal.setitimer(signal.ITIMER_REAL, limits.wall_s)
        return GradeReply(request.number, _checked(task.grade(answer, response)))
    except MemoryError:
        return GradeReply(request.number)
    except Exception:
        return GradeReply(request.number, error=traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _checked(grade: Grade) -> Grade:
    """What a task of a user's gave back."""
    if not isinstance(grade, Grade) or not isinstance(grade.verdict, Verdict):
        raise TypeError(f"grade() returned {grade!r}, and not a Grade with a Verdict")
    (grade.canonical + grade.detail).encode()  # both are written to a file
    return grade


def _limit_itself(limits: Limits) -> None:
    for name in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(name, signal.SIG_DFL)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * _PAGE
    limit = used + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where the machine's memory ends all the same, not the trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Grades behind a pipe; started by a pool.")
    parser.add_argument("--pipe", type=int, required=True, help="inherited file descriptor")
    parser.add_argument("--parent", type=int, required=True, help="process to die with")
    parser.add_argument("--cpu-s", type=float, required=True)
    parser.add_argument("--wall-s", type=float, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--preload", nargs="*", default=[], help="modules that grading needs")
    arguments = parser.parse_args()
    die_with(arguments.parent)
    for name in (signal.SIGINT, signal.SIGTERM):  # when to end is the parent's to say
        signal.signal(name, signal.SIG_IGN)
    os.set_inheritable(arguments.pipe, False)
    for name in arguments.preload:
        module = importlib.import_module(name)
        getattr(module, "warm_up", lambda: None)()
    limits = Limits(arguments.cpu_s, arguments.wall_s, arguments.memory_bytes)
    with suppress(BrokenPipeError):  # the pool has gone meanwhile
        keep(Connection(arguments.pipe), limits)


if __name__ == "__main__":
    main()
