"""Options of evaluations."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from megatron_eopd.config.section import Section


def task_parts(text: str) -> tuple[str, str | None]:
    """The word of a task, and its file: `gsm8k=test.jsonl` has both, `countdown` no file."""
    word, separator, source = text.partition("=")
    return word, source if separator else None


class EvaluationConfig(Section):
    tasks: tuple[str, ...] = ()
    """What is evaluated, a list; nothing by default. `countdown`; `math500`, `gsm8k`, `amc23`,
    `minerva`, `olympiadbench`, `aime24`, `aime25`, `champ`, whose problems are in
    evaluation.data_dir/NAME.jsonl, else on the Hugging Face hub, or in the file of `NAME=FILE`;
    `math=FILE` and `number=FILE` for problems of your own, answers in a box or the last number of
    the text, named after the file; `module:Class` or `module:Class=FILE` for a task of your own."""
    data_dir: Path = Path("data")
    """Where the problems of a task are looked for that names no file."""
    interval: int = Field(50, ge=0)
    """Iterations between evaluations, beside the ones before the first and after the last; 0: only
    those two."""
    num_problems: int = Field(200, gt=0)
    """Problems taken from the start of each task's."""
    samples_per_problem: int = Field(16, gt=0)
    """Responses per problem; bounds the k of pass@k."""
    temperature: float | None = Field(None, ge=0)
    """Of the samples; 0 takes the likeliest token always. Default: rollout.temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Samples are drawn from the likeliest tokens that together have this probability."""
    max_response_length: int | None = Field(None, gt=0)
    """In tokens; default: rollout.max_response_length."""
    seed: int = 0x5EED
    """The same draws at every evaluation, so that two evaluations differ by the weights alone."""
    grading_workers: int = Field(2, gt=0)
    """Processes that grade, beside the one that asks."""
    grading_timeout_s: float = Field(1.5, gt=0)
    """Processor time that grading one response may take; then it is counted as timed out."""
    bootstrap_draws: int = Field(10_000, ge=100)
    """Of the 95 % intervals, which are drawn over problems."""

    @model_validator(mode="after")
    def _draws_different_samples(self) -> "EvaluationConfig":
        if self.temperature == 0 and self.samples_per_problem > 1:
            raise ValueError(
                f"temperature=0 writes the same response samples_per_problem="
                f"{self.samples_per_problem} times. Set samples_per_problem=1."
            )
        return self

    @field_validator("tasks", mode="before")
    @classmethod
    def _are_a_list(cls, value: Any) -> Any:
        if value in (None, "", "none"):
            return ()
        return (value,) if isinstance(value, str) else value

    @field_validator("tasks")
    @classmethod
    def _are_named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"names a task twice: {', '.join(value)}.")
        for text in value:
            word, source = task_parts(text)
            if not word or source == "":
                raise ValueError(f"{text!r} is no NAME and no NAME=FILE.")
        return value
