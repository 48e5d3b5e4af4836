"""What travels on the pipe between the trainer's rank 0 and the engine process, pickled.

In a module of its own: the engine process runs `vllm_child` as `__main__`, and what is defined
there would not be found again by the trainer.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """Made by the trainer's EngineProcess. `verb` names a method of Server."""

    verb: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """Made by Server, read by the trainer's EngineProcess."""

    value: Any = None
    is_part: bool = False
    """Whether more of the answer comes behind it; the last reply then has no value."""
    error: str | None = None
    """Why the request failed; the engine itself still runs."""


@dataclass(frozen=True)
class SampleRequest:
    prompt_ids: list[int]
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: list[int]


@dataclass(frozen=True)
class Sample:
    """vLLM's answer to a SampleRequest; those of one call come as they end, one by one."""

    number: int
    """Which of the call's requests it answers."""
    response_ids: list[int]
    response_logprobs: list[float]
    finish_reason: str
    weight_versions: list[str]
    """Every version that wrote a token of it, from vLLM's own records."""
