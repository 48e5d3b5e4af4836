"""Held-out problems, as the student reads them. In: tasks. Out: a ProblemSet of each."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from megatron_eopd.config import Config, EvaluationConfig
from megatron_eopd.data.encoding import PromptEncoder
from megatron_eopd.data.teacher_prompts import PromptsOfTeachers, default_teacher
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.grading_pool import GradingPool
from megatron_eopd.records import Prompt
from megatron_eopd.tasks.registry import open_tasks, row_of
from megatron_eopd.tasks.task import Problem, Task


@dataclass(frozen=True)
class ProblemSet:
    task: Task
    problems: list[Problem]
    prompts: list[Prompt]
    """Of each problem."""

    @property
    def name(self) -> str:
        return self.task.name

    @cached_property
    def digest(self) -> str:
        """Changes with any problem's question or answer, and with their number."""
        told = [(p.text, p.answer, [list(turn) for turn in p.context]) for p in self.problems]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def chunks(self, size: int) -> Iterator[list[Prompt]]:
        """`size` prompts at a time."""
        for first in range(0, len(self.prompts), size):
            yield self.prompts[first : first + size]


def load_problem_sets(
    config: Config, tokenizer: Tokenizer, read_by_teachers: PromptsOfTeachers | None = None
) -> list[ProblemSet]:
    """The first `evaluation.num_problems` of every task; `read_by_teachers`: what those are shown.

    Raises:
        ConfigError: no such task; a file that is missing or empty, or a line that cannot be used.
    """
    options = config.evaluation
    if not options.tasks:
        return []
    encoder = PromptEncoder(config.data, tokenizer)
    tasks = open_tasks(options, with_suffix=not config.data.prompt_suffix)
    shown = read_by_teachers or PromptsOfTeachers()
    teacher = default_teacher(config)
    return [_load(task, options.num_problems, encoder, shown, teacher) for task in tasks]


def grading_pool(problem_sets: Sequence[ProblemSet], options: EvaluationConfig) -> GradingPool:
    """For their answers."""
    return GradingPool(
        [problems.task for problems in problem_sets],
        workers=options.grading_workers,
        cpu_s=options.grading_timeout_s,
    )


def _load(
    task: Task, count: int, encoder: PromptEncoder, shown: PromptsOfTeachers, teacher: str
) -> ProblemSet:
    """`teacher`: who scores them."""
    problems = list(islice(task.problems(), count))
    if not problems:
        raise ConfigError(f"evaluation.tasks: {task.name} has no problems.")
    rows = [row_of(problem)._replace(teacher=teacher) for problem in problems]
    read = shown.of_problems(task.name, rows)
    prompts = [encoder.prompt(n, *each) for n, each in enumerate(zip(rows, read, strict=True))]
    return ProblemSet(task, problems, prompts)
