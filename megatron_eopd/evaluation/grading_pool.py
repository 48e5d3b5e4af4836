"""Graders in processes that can be killed. In: a task, an answer, a response. Out: a future Grade.

Each worker is a thread of the caller's and a keeper process with a grader under it (grading_child),
which share a pipe with nobody else: one that is killed, at whatever instruction, holds no lock that
another needs. No process is forked from the caller, which may have threads, GPUs and groups.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from multiprocessing import Pipe
from queue import Queue
from threading import Thread
from typing import NamedTuple, Self

from megatron_eopd.data.prompt_files import places
from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.grading_messages import GradeReply, GradeRequest, Reading
from megatron_eopd.tasks.task import Grade, Problem, Task, Verdict

CHILD_MODULE = "megatron_eopd.evaluation.grading_child"
MARGIN_S = 10.0
"""Above the wall-clock limit, which a grader keeps by itself: for one that was stopped."""
ATTEMPTS = 3
"""At an answer whose keeper dies; only somebody from outside, or a full machine, kills those."""


class _Item(NamedTuple):
    payload: bytes
    future: "Future[Grade]"


class GradingPool:
    """Grades, until the end of its `with` block: at the end of a good one all that was submitted is
    graded, at an exception what waits is cancelled.

    A grade is TIMED_OUT where it took more processor time or memory than it may, and where its
    process ended otherwise: then `detail` says how. An exception of the task's own is raised by the
    future, as a ConfigError with its traceback.
    """

    def __init__(
        self,
        tasks: Iterable[Task] = (),
        *,
        workers: int = 2,
        cpu_s: float = 1.5,
        wall_s: float = 60.0,
        memory_mb: int = 1024,
        max_pending: int = 256,
    ) -> None:
        """
        tasks: whose `preload`, modules that grading needs, is imported once, not by every grader.
        cpu_s: processor time, from when the work starts, so the same on a busy machine. An
            expression takes 0.15 s at most of those that people write as answers.
        max_pending: above it, `submit` waits.
        """
        modules = {name for task in tasks for name in getattr(task, "preload", ())}
        self._queue: Queue[_Item | None] = Queue(max_pending)
        options = {"cpu-s": cpu_s, "wall-s": wall_s, "memory-bytes": memory_mb << 20}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        arguments += ["--preload", *sorted(modules)]
        self._workers = [_Worker(self._queue, arguments, wall_s + MARGIN_S) for _ in range(workers)]

    def __enter__(self) -> Self:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        if exception_type is not None:
            while not self._queue.empty():
                with suppress(Exception):
                    item = self._queue.get_nowait()
                    item.future.cancel()
        for _ in self._workers:
            self._queue.put(None)
        for worker in self._workers:
            if exception_type is not None:
                worker.kill()
            worker.join()

    def submit(self, task: Task, answer: str, response: str) -> "Future[Grade]":
        future: Future[Grade] = Future()
        try:
            payload = pickle.dumps((task, answer, response))
        except Exception as error:
            raise ConfigError(
                f"the task {task.name} cannot be sent to a process that grades: {error}. Keep what "
                f"it needs for that in its module."
            ) from None
        self._queue.put(_Item(payload, future))
        return future


class _Worker(Thread):
    """Grades one item after the other, with one keeper after the other where they die."""

    def __init__(self, queue: "Queue[_Item | None]", arguments: list[str], patience_s: float):
        super().__init__(name="grading", daemon=True)
        self._queue, self._arguments, self._patience_s = queue, arguments, patience_s
        self._keeper: _Keeper | None = None
        self._is_killed = False

    def run(self) -> None:
        with suppress(OSError, EOFError):  # told with the first grade
            self._keeper = _Keeper(self._arguments, self._patience_s)
        while (item := self._queue.get()) is not None:
            if not item.future.set_running_or_notify_cancel():
                continue
            try:
                item.future.set_result(self._grade(item.payload))
            except Exception as error:
                item.future.set_exception(error)
        if self._keeper is not None:
            self._keeper.end(MARGIN_S)

    def kill(self) -> None:
        """What it grades is TIMED_OUT at once."""
        self._is_killed = True
        if (keeper := self._keeper) is not None:
            keeper.process.kill()

    def _grade(self, payload: bytes) -> Grade:
        for _ in range(ATTEMPTS):
            if self._is_killed:
                break
            try:
                self._keeper = self._keeper or _Keeper(self._arguments, self._patience_s)
                reply = self._keeper.ask(payload)
            # The keeper itself has died, not a grader of its; that is not the answer's fault.
            except (OSError, EOFError, pickle.UnpicklingError):
                if self._keeper is not None:
                    self._keeper.end(0)
                self._keeper = None
                continue
            if reply.error:
                raise ConfigError(f"the task's own grading failed:\n{reply.error}")
            return Grade(Verdict.TIMED_OUT) if reply.grade is None else reply.grade
        else:
            raise RuntimeError(f"{ATTEMPTS} grading processes have died; see what they wrote")
        return Grade(Verdict.TIMED_OUT)


class _Keeper:
    """A child of the thread that makes it: Linux ends it with that, however that one ends."""

    def __init__(self, arguments: list[str], patience_s: float) -> None:
        self._numbers, self._patience_s = count(1), patience_s
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", CHILD_MODULE, "--pipe", str(theirs.fileno())]
        self.process = subprocess.Popen(
            [*command, "--parent", str(os.getpid()), *arguments],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the caller's to handle
        )
        theirs.close()

    def ask(self, payload: bytes) -> GradeReply:
        """
        Raises:
            OSError, EOFError, UnpicklingError: it died, or hangs.
        """
        number = next(self._numbers)
        self._pipe.send(GradeRequest(number, payload))
        while self._pipe.poll(self._patience_s):
            reply: GradeReply = self._pipe.recv()
            if reply.number == number:  # not of a grader that was killed behind its reply
                return reply
        raise OSError(f"no reply within {self._patience_s} s")

    def end(self, patience_s: float) -> None:
        self._pipe.close()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _environment() -> dict[str, str]:
    """The modules of the caller's, and none of its threads: two graders share two cores."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def check_answers(task: Task, problems: Sequence[Problem], pool: GradingPool) -> None:
    """
    Raises:
        ConfigError: problems whose own answer cannot be read, or is not graded right, so that none
            ever could be; or a task that is none.
    """
    for problem in problems:
        if (count := task.num_right(problem.answer)) is not None and count < 1:
            raise ConfigError(f"{task.name}: num_right is {count} for {problem.where}.")
    graded = [
        None if response is None else pool.submit(task, problem.answer, response)
        for problem in problems
        for response in (task.right_response(problem.answer),)
    ]
    if not any(graded):
        _check_grades(task, problems[0], pool)
    if hasattr(task, "is_gradable"):
        _require_right(
            task.name,
            problems,
            [pool.submit(Reading(task), problem.answer, "") for problem in problems],
            "that the grader cannot read, so that no other spelling of it could be right",
            "Write what it comes to, or take these lines out.",
        )
    _require_right(
        task.name,
        problems,
        graded,
        "that is not graded right when a model writes it, and could never be",
        "Take these lines out, or correct them.",
    )


def _check_grades(task: Task, problem: Problem, pool: GradingPool) -> None:
    """Whether it grades at all, where no right response is known."""
    grade = pool.submit(task, problem.answer, "").result()
    if grade.verdict is Verdict.TIMED_OUT and grade.detail:
        raise ConfigError(
            f"{task.name}: at grading an empty response to {problem.where} {grade.detail}. Give "
            f"back a Grade at every response."
        )


def _require_right(
    name: str,
    problems: Sequence[Problem],
    futures: Sequence["Future[Grade] | None"],
    fault: str,
    advice: str,
) -> None:
    failed = [
        (problem, grade)
        for problem, future in zip(problems, futures, strict=True)
        if future is not None and (grade := future.result()).verdict is not Verdict.RIGHT
    ]
    if failed:
        first, grade = failed[0]
        detail = f" ({grade.detail})" if grade.detail else ""
        raise ConfigError(
            f"{name}: {len(failed)} of {len(problems)} problems have an answer {fault}: "
            f"{places([problem.where for problem, _ in failed])}. The first is "
            f"{first.answer[:80]!r}: {grade.verdict}{detail}. {advice}"
        )
