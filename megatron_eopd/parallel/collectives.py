"""Answers and errors that all ranks share. In: what one rank knows. Out: the same on every rank.

An engine lives on one rank and can fail there alone. A rank that raised while the others went on
into the next collective would leave them waiting, so an outcome is agreed before anybody raises.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from megatron_eopd.errors import EngineError, ExpectedError, Interrupted, LostRankError, RemoteError

T = TypeVar("T")


_LOST = re.compile(
    "timed? ?out|connection (closed|reset|refused)|broken pipe|aborted", re.IGNORECASE
)


@contextmanager
def naming_stage(stage: str) -> Iterator[None]:
    """Turn what a collective of the block raises about a lost rank into a LostRankError.

    `stage`: what the run does, and what this rank is in it.
    """
    try:
        yield
    except RuntimeError as error:
        if not tells_of_lost_rank(error):
            raise
        raise lost_rank(error, stage) from error


def tells_of_lost_rank(error: BaseException) -> bool:
    """Whether a collective raised it because another rank is gone."""
    # Ours have other types; a collective raises RuntimeError or one of torch.distributed's.
    is_torchs = type(error) is RuntimeError or isinstance(error, dist.DistError)
    return is_torchs and _LOST.search(str(error)) is not None


def lost_rank(error: BaseException, stage: str) -> LostRankError:
    return LostRankError(
        f"another rank is lost, or slower than parallel.distributed_timeout_minutes. This rank "
        f"noticed in {stage}: {reason_of(error)} Look for the first error in the files of "
        f"RUN_DIR/log."
    )


def reason_of(error: BaseException) -> str:
    """What a failed collective says, without the source line of gloo before it and the advice
    behind it."""
    text = re.sub(r"^\[[^\]]*\] ", "", str(error).splitlines()[0])
    return f"{text.split('. ')[0].rstrip('.')}."


def from_rank_zero(compute: Callable[[], T], group: dist.ProcessGroup) -> T:
    """What `compute` returns on the group's rank 0, or its exception, on every rank of the group.

    One broadcast of pickled objects over `group` (gloo), whose time-out must be longer than
    `compute` may take: the other ranks wait for that long. Rank 0 raises its own exception; the
    others raise the same if it is an EngineError or Interrupted, and otherwise RemoteError with the
    same message.
    """
    outcome: list = [None]
    own_error: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            outcome = [(compute(), None)]
        except Exception as error:
            own_error, outcome = error, [(None, _encode(error))]
    dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
    if own_error is not None:
        raise own_error
    result, error = outcome[0]
    if error is not None:
        raise _decode([error])
    return result


def gather_everywhere(value: T, group: dist.ProcessGroup) -> list[T]:
    """Of every rank of the group, in their order, on every rank. Picklable."""
    every: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, value, group=group)
    return every


def gather_on_rank_zero(value: T, group: dist.ProcessGroup) -> list[T] | None:
    """Of every rank, in their order, on the group's rank 0; None on the others."""
    is_first = dist.get_rank(group) == 0
    every: list | None = [None] * dist.get_world_size(group) if is_first else None
    dist.gather_object(value, every, group_dst=0, group=group)
    return every


@contextmanager
def collecting(errors: list[Exception]) -> Iterator[None]:
    """Keep an exception of the block for `raise_together`, and go on: the other ranks may be in
    the next step's collectives."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def raise_together(own_errors: Sequence[Exception], group: dist.ProcessGroup) -> None:
    """Raise on every rank of the group if any rank brought an error, naming all of them.

    One all-gather of pickled objects over `group` (gloo).
    """
    gathered = gather_everywhere([_encode(error) for error in own_errors], group)
    raised = [error for errors in gathered for error in errors]
    if raised:
        raise _decode(raised) from (own_errors[0] if own_errors else None)


_TOLD = (EngineError, Interrupted)
"""What all ranks raise as it is; the first of them that any rank brought."""


def _encode(error: Exception) -> tuple[type[Exception], str]:
    """As text: an exception of another library may not survive pickling."""
    kind = next((kind for kind in _TOLD if isinstance(error, kind)), RemoteError)
    speaks = isinstance(error, ExpectedError | Interrupted)
    return kind, str(error) if speaks else f"{type(error).__name__}: {error}"


def _decode(errors: list[tuple[type[Exception], str]]) -> Exception:
    text = "\n".join(dict.fromkeys(message for _, message in errors))
    kinds = {kind for kind, _ in errors}
    return next((kind for kind in _TOLD if kind in kinds), RemoteError)(text)
