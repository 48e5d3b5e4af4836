"""What a grading pool and its processes send each other. A module of its own: the process runs the
other end as __main__, whose classes the pool could not unpickle.
"""

from typing import NamedTuple

from megatron_eopd.tasks.task import Grade


class GradeRequest(NamedTuple):
    number: int
    """Above 0; the reply has the same."""
    payload: bytes
    """(task, answer, response), pickled: whoever cannot unpickle it says so in its reply."""


class GradeReply(NamedTuple):
    number: int
    grade: Grade | None = None
    """None where the grader ran out of time or memory, or died otherwise."""
    error: str = ""
    """What the task raised: a fault of its own."""


class Limits(NamedTuple):
    cpu_s: float
    """Processor time of one answer."""
    wall_s: float
    """For what sleeps."""
    memory_bytes: int
    """Above what the grader has at its start."""
