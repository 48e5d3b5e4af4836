"""What travels between rank 0, the ranks that own an engine, and the engines' processes.

Plain data, pickled on pipes and connections that exist between these processes alone. In a module
of its own: the engine process runs `vllm_child` as `__main__`, and what is defined there would not
be found again by the trainer.
"""

from dataclasses import dataclass, field
from typing import Any

from megatron_eopd.parallel.farewell import Farewell


@dataclass(frozen=True)
class Request:
    """Of rank 0 to an engine. `verb` names a method of the child's Server."""

    number: int
    """The replies bear it."""
    verb: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """Of an engine to rank 0; all but the last of a request are parts."""

    number: int
    value: Any = None
    is_part: bool = False
    """Whether more of the answer comes behind it."""
    error: str | None = None
    """Why the request failed; the engine itself still runs."""


@dataclass(frozen=True)
class Orders:
    """Of rank 0 to the rank that owns an engine, for one exchange."""

    start: bool = False
    """End the engine's process, if there is one, and start another."""
    kill: bool = False
    requests: tuple[Request, ...] = ()
    """For the engine."""
    open_outlet: int | None = None
    """Begin a weight sync with so many engine workers on the owner's host; the report brings the
    addresses. For owners outside of the student's ranks; see weight_sync.outlet."""
    run_outlet: bool = False
    """Hand on what the stages' leaders send; the report comes when all of it is read."""
    rest: bool = False
    """The last exchange of this call: go back to what all ranks do."""
    end: Farewell | None = None
    """The last exchange of the run."""


@dataclass(frozen=True)
class Report:
    """What the owner of an engine has to tell, in answer to Orders."""

    replies: tuple[Reply, ...] = ()
    death: str | None = None
    """How the engine's process ended, and what it wrote last."""
    last_line: str = ""
    """Of its log, while it starts."""
    addresses: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """By pipeline stage, what `open_outlet` asked for."""
    error: str | None = None
    """Why `run_outlet` failed."""


@dataclass(frozen=True)
class SampleRequest:
    number: int
    """Among the requests of a call."""
    group: int
    """Requests of the same prompt have the same."""
    prompt_ids: list[int]
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: list[int]


@dataclass(frozen=True)
class Sample:
    """vLLM's answer to a SampleRequest; they come as they end, one by one."""

    number: int
    """Of the request."""
    response_ids: list[int]
    response_logprobs: list[float]
    finish_reason: str
    weight_versions: list[str]
    """Every version that wrote a token of it, from vLLM's own records."""


@dataclass(frozen=True)
class Heartbeat:
    """An engine that generates tells of itself, about once a second."""

    tokens: int
    """Generated since the last one."""
    unfinished: int
    """Requests that it has."""
