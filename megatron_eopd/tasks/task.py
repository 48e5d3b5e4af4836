"""What a task is: problems, and verdicts on answers. Training, evaluation and data preparation know
this and no task.

A task of your own is a class with these methods, in a file of its own, named `module:Class`.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # it brings torch, which a process that grades does without
    from megatron_eopd.records import Turn


class Problem(NamedTuple):
    where: str
    """What it stands in, for messages: `FILE line 3`."""
    text: str
    """The question as a model reads it, with whatever the task says about the form of answers."""
    answer: str
    """What `grade` needs to judge a response."""
    context: "tuple[Turn, ...]" = ()
    """The turns of a chat before `text`."""
    columns: Mapping[str, Any] | None = None
    """More of the problem by name, such as its solution, for teachers that are shown more than the
    student: see data.teacher_prompt_template."""


class Verdict(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"
    NO_ANSWER = "no answer"
    """The response holds nothing in the form of an answer, or was cut before it ended."""
    UNPARSABLE = "unparsable"
    """It holds an answer that no grader can read."""
    TIMED_OUT = "timed out"
    """Grading took longer, or more memory, than it may; or its process ended by itself, as the
    grade's `detail` says."""


class Grade(NamedTuple):
    verdict: Verdict
    canonical: str = ""
    """The spelling under which equal answers are equal, right or wrong; empty where there is no
    answer."""
    second: bool | None = None
    """Whether a simpler, independent grader takes the answer for right; None without one."""
    detail: str = ""
    """For who reads the samples. Of TIMED_OUT: how the process ended, where no limit ended it."""


class Task(Protocol):
    """Stateless, and pickled: grading is done in processes that can be killed.

    It may also have `preload`, names of modules that those processes import once, before they
    grade; and `is_gradable(answer)`, False for one that no response could be graded right for but
    by luck, which those processes ask before a run begins.
    """

    name: str
    """Of the figures, eval/NAME/…, and of files."""

    def problems(self) -> Iterable[Problem]:
        """The held-out problems, in an order that never changes.

        Raises:
            ConfigError: a file that is missing or empty, or a line that cannot be used (which one).
        """
        ...

    def grade(self, answer: str, response: str) -> Grade:
        """`answer`: of a problem. `response`: the text that a model wrote, whole."""
        ...

    def right_response(self, answer: str) -> str | None:
        """A response that must be graded right; every problem's is, before a run begins. None where
        a task knows none."""
        ...

    def num_right(self, answer: str) -> int | None:
        """How many different right answers there are; None where nobody knows."""
        ...

    def graders(self) -> dict[str, str]:
        """Names and versions of what grades: figures by other ones are not compared."""
        ...
