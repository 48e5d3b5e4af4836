"""A wire between two worlds: a process group of their own on the job's store.

torch.distributed's default groups belong to the worlds; this one is joined beside them, as the
weight sync's is, so a world that dies closes its end and the other notices.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo

from megatron_eopd.parallel.collectives import reason_of
from megatron_eopd.teacher.exchange import Message


class WireError(RuntimeError):
    """The other end is gone or late."""


class JointWire:
    """Between all ranks of student and teacher, numbered through, the student's first."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout_minutes: float,
        device: torch.device,
    ) -> None:
        """Meets all others; returns once they have come."""
        self._timeout = timedelta(minutes=timeout_minutes)
        try:
            self._group = _join(store, rank, world_size, self._timeout, device)
        except RuntimeError as error:
            raise WireError(reason_of(error)) from None
        self._pending: list[tuple[dist.Work, torch.Tensor]] = []

    def swap(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Returns when the `receives` are filled; what is sent may still be on its way."""
        try:
            self._pending += [(self._group.send([x], rank, 0), x) for rank, x in sends]
            for work in [self._group.recv([x], rank, 0) for rank, x in receives]:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise WireError(reason_of(error)) from None

    def flush(self) -> None:
        """Wait until everything that was sent has been taken."""
        pending, self._pending = self._pending, []
        try:
            for work, _ in pending:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise WireError(reason_of(error)) from None


def _join(
    store: dist.Store, rank: int, world_size: int, timeout: timedelta, device: torch.device
) -> ProcessGroup:
    if device.type == "cpu":
        return ProcessGroupGloo(PrefixStore("gloo", store), rank, world_size, timeout)
    # Not covered by the test suite, which has no two GPUs.
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(PrefixStore("nccl", store), rank, world_size, options)
