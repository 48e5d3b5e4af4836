"""Wires: tensors from rank to rank, inside one world or between two.

torch.distributed's default groups belong to the worlds. Between two of them a process group of its
own is joined on the job's store, as the weight sync's is, so a world that dies closes its end and
the other notices.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo
from torch.distributed.distributed_c10d import BroadcastOptions

from megatron_eopd.errors import WireError
from megatron_eopd.parallel.collectives import reason_of

Message = tuple[int, torch.Tensor]
"""The other rank, and a contiguous tensor to send to it or to fill from it."""


class Wire(Protocol):
    """Point to point, between ranks numbered through both worlds."""

    def swap(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Returns when the `receives` are filled. Messages of a pair of ranks arrive in order."""
        ...


class GroupWire:
    """Over a torch.distributed group that has all ranks of student and teacher."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Collective over the group: NCCL wants all its ranks in its first call, and the ranks of
        the last stages would be alone in theirs."""
        self._group = group
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    def swap(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        operations = [
            *(dist.P2POp(dist.isend, tensor, rank, self._group) for rank, tensor in sends),
            *(dist.P2POp(dist.irecv, tensor, rank, self._group) for rank, tensor in receives),
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


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
        """Returns when the `receives` are filled; what is sent may still be on its way.

        Over NCCL what one rank sends to another in one call, that one receives in one call.
        """
        if not (sends or receives):
            return
        try:
            if self._group.supports_coalescing:
                self._swap_as_one(sends, receives)
            else:
                self._pending += [(self._group.send([x], rank, 0), x) for rank, x in sends]
                for work in [self._group.recv([x], rank, 0) for rank, x in receives]:
                    work.wait(self._timeout)
        except RuntimeError as error:
            raise WireError(reason_of(error)) from None

    def _swap_as_one(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """NCCL's way: in a group no message waits for one before it, and all go over the
        communicator of all ranks. Alone, each pair of ranks would make a communicator of its own
        in the first iteration, which costs seconds, and memory of the GPU for the whole run."""
        self._group._start_coalescing()
        try:
            for rank, x in sends:
                self._group.send([x], rank, 0)
            for rank, x in receives:
                self._group.recv([x], rank, 0)
        finally:  # a group that stays open would swallow what comes next
            work = self._group._end_coalescing()
        if receives:
            work.wait(self._timeout)
        else:
            self._pending += [(work, x) for _, x in sends]

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Of rank 0, into the tensors of the others."""
        try:
            self._group.broadcast([tensor], _from_rank_zero(self._timeout)).wait(self._timeout)
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


def _from_rank_zero(timeout: timedelta) -> BroadcastOptions:
    options = BroadcastOptions()
    options.rootRank, options.timeout = 0, timeout
    return options


def _join(
    store: dist.Store, rank: int, world_size: int, timeout: timedelta, device: torch.device
) -> ProcessGroup:
    if device.type == "cpu":
        return ProcessGroupGloo(PrefixStore("gloo", store), rank, world_size, timeout)
    # Not covered by the test suite, which has no two GPUs.
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = ProcessGroupNCCL(PrefixStore("nccl", store), rank, world_size, options)
    # NCCL makes the communicator in the first call, which has to be one of all ranks.
    group.allreduce([torch.zeros(1, device=device)]).wait(timeout)
    return group
