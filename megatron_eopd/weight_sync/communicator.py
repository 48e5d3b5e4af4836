"""Transfer groups: the leader of a pipeline stage (rank 0) and the engine's workers.

A communicator has three verbs, `broadcast`, `abort` and `close`, and lives on a store of its own,
outside torch.distributed's default group: the engine's processes are not part of the trainer's
world. No vLLM is imported here, so that trainer ranks never load it.
"""

from datetime import timedelta
from typing import Protocol

import torch
from torch.distributed import DistError, PrefixStore, ProcessGroup, ProcessGroupGloo, TCPStore
from torch.distributed.distributed_c10d import BroadcastOptions


class TransferError(RuntimeError):
    """The other side of a transfer group is gone, late, or sent something else."""


class Communicator(Protocol):
    def broadcast(self, tensor: torch.Tensor, *, timeout_s: float, src: int = 0) -> None:
        """Send (rank `src`) or fill (the others) `tensor`; done when it returns.

        Raises:
            TransferError: lost or late. The group is then of no further use.
        """
        ...

    def abort(self) -> None:
        """Give up at once, and let go of whoever waits for this rank."""
        ...

    def close(self) -> None: ...


def serve_store(port: int, timeout_s: float) -> TCPStore:
    """The meeting point of one transfer group, listening on this host; port 0 takes a free one."""
    try:
        return TCPStore(
            "0.0.0.0",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except DistError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise TransferError(
            f"port {port} is in use on this host, and weight_sync.port asks for it. Set "
            "weight_sync.port to the first of a row of free ports, one per pipeline stage, or "
            "to 0, which takes free ones."
        ) from None


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    except DistError as error:
        raise TransferError(
            f"no stage leader answers at {host}:{port} within {timeout_s:.0f} s ({error}). Set "
            "weight_sync.host to an address of the trainer that the engine reaches."
        ) from None


class GlooCommunicator:
    """Through host memory: tensors must lie there. Works without a GPU and beside one."""

    device = torch.device("cpu")

    def __init__(self, store: TCPStore, rank: int, world_size: int, timeout_s: float):
        """Meets the other ranks on `store`; returns once all `world_size` have come."""
        try:
            self._group: ProcessGroup | None = ProcessGroupGloo(
                PrefixStore("gloo", store), rank, world_size, timedelta(seconds=timeout_s)
            )
        except RuntimeError as error:
            raise _late(f"rank {rank} of {world_size} met no full group", error) from None
        # Rank 0's store serves the others, so it has to live as long as the group.
        self._store = store

    def broadcast(self, tensor: torch.Tensor, *, timeout_s: float, src: int = 0) -> None:
        group = self._group
        if group is None:
            raise TransferError("the transfer group was closed before the broadcast")
        try:
            group.broadcast([tensor], _options(src, timeout_s)).wait()
        except RuntimeError as error:
            raise _late(f"a broadcast of {tensor.nbytes:,} bytes failed", error) from None

    def abort(self) -> None:
        # Gloo's own abort does nothing. Letting go of the group closes its sockets, which the
        # other side notices at once; a broadcast in flight here ends at its own time-out.
        self._group = None

    def close(self) -> None:
        self._group = None


class NcclCommunicator:
    """GPU to GPU. Not covered by the test suite, which has no two GPUs to put it on: one process
    group per pair of devices, so an engine worker may not share the stage leader's GPU."""

    def __init__(self, store: TCPStore, rank: int, world_size: int, timeout_s: float):
        from torch.distributed import ProcessGroupNCCL

        self.device = torch.device("cuda", torch.cuda.current_device())
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        self._group = ProcessGroupNCCL(PrefixStore("nccl", store), rank, world_size, options)
        self._store = store

    def broadcast(self, tensor: torch.Tensor, *, timeout_s: float, src: int = 0) -> None:
        # The transfer runs on a thread of its own, and the current device belongs to the thread.
        torch.cuda.set_device(self.device)
        try:
            self._group.broadcast([tensor], _options(src, timeout_s)).wait()
            # `wait` only orders streams; the receiver reads the tensor on another thread's stream.
            torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise _late(f"a broadcast of {tensor.nbytes:,} bytes failed", error) from None

    def abort(self) -> None:
        self._group.abort()

    def close(self) -> None:
        self._group.shutdown()


def make_communicator(
    backend: str, store: TCPStore, rank: int, world_size: int, timeout_s: float
) -> Communicator:
    """`backend` is "gloo" or "nccl", and the same on every rank of the group."""
    kinds = {"gloo": GlooCommunicator, "nccl": NcclCommunicator}
    return kinds[backend](store, rank, world_size, timeout_s)


def _options(src: int, timeout_s: float) -> BroadcastOptions:
    options = BroadcastOptions()
    options.rootRank = src
    options.timeout = timedelta(seconds=max(timeout_s, 0.001))
    return options


def _late(what: str, error: Exception) -> TransferError:
    return TransferError(f"{what}: {str(error).splitlines()[0]}")
