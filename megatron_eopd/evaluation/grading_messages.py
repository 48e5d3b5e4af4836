"""What a grading pool and its processes send each other. A module of its own: the process runs the
other end as __main__, whose classes the pool could not unpickle.
"""

from typing import NamedTuple

from megatron_eopd.tasks.task import Grade, Task, Verdict


class GradeRequest(NamedTuple):
    number: int
    """Above 0; the reply has the same."""
    payload: bytes
    """(task, answer, response), pickled: whoever cannot unpickle it says so in its reply."""


class Reading(NamedTuple):
    """In a request, in the place of a task that can say of answers whether it can grade them.
    RIGHT: it can. Reading one may take as long as grading, and is bounded alike."""

    task: Task

    @property
    def name(self) -> str:
        return self.task.name

    def grade(self, answer: str, response: str) -> Grade:
        return Grade(Verdict.RIGHT if self.task.is_gradable(answer) else Verdict.UNPARSABLE)


class GradeReply(NamedTuple):
    number: int
    grade: Grade | None = None
    """None where the grader ran out of memory."""
    error: str = ""
    """What the task raised: a fault of its own."""


class Limits(NamedTuple):
    cpu_s: float
    """Processor time of one answer."""
    wall_s: float
    """For what sleeps."""
    memory_bytes: int
    """Above what the grader has at its start."""
