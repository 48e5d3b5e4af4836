"""The trainer's half of the weight sync, on every rank.

In: an export of the student's tensors, bucket by bucket. Out: their bytes at the engine's workers,
over one transfer group per pipeline stage: the stage's leader and the workers. Methods are
collective over the trainer's ranks; the engine itself is reached by rank 0 alone, through the
function that the caller passes in.
"""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_eopd.config import WeightSyncConfig
from megatron_eopd.errors import EngineError
from megatron_eopd.parallel.collectives import collecting, gather_everywhere, raise_together
from megatron_eopd.weight_sync.communicator import make_communicator, serve_store
from megatron_eopd.weight_sync.manifest import Manifest
from megatron_eopd.weight_sync.sender import WeightSender

ExportBuckets = Callable[[], Iterator[list[torch.Tensor]]]


class WeightBridge:
    def __init__(
        self,
        *,
        manifest: Manifest,
        stage_leader: int | None,
        export_buckets: ExportBuckets,
        config: WeightSyncConfig,
        backend: str,
        num_workers: int,
        cpu_group: dist.ProcessGroup,
    ):
        """See VllmEngine for `stage_leader` and `export_buckets`; num_workers: of the engine."""
        self.manifest = manifest
        self.connected = False
        """Whether the transfer groups stand. A failed sync takes them down."""
        self._stage, self._export_buckets = stage_leader, export_buckets
        self._config, self._backend, self._num_workers = config, backend, num_workers
        self._group = cpu_group
        self._sender: WeightSender | None = None  # on stage leaders only

    def connect(self, tell_engine: Callable[[dict[str, Any]], None] | None) -> None:
        """Build the transfer groups. `tell_engine`, on rank 0, gives the engine its InitInfo and
        returns when all its workers have joined every group.

        Raises:
            EngineError: on all ranks, if anybody failed to join.
        """
        errors: list[Exception] = []
        store, address = None, None
        with collecting(errors):
            if self._stage is not None:
                first_port = self._config.port
                port = first_port + self._stage if first_port else 0
                store = serve_store(port, self._config.timeout_s)
                address = (self._stage, socket.gethostname(), store.port)
        self.agree(errors)
        addresses = gather_everywhere(address, self._group)
        init_info = {
            "manifest": self.manifest.to_json(),
            "digest": self.manifest.digest,
            "addresses": self._reachable([a for a in addresses if a is not None]),
            "timeout_s": self._config.timeout_s,
        }
        # Leaders and workers wait for each other; a thread, so that rank 0 can do both, and sees
        # its engine die instead of waiting here for a worker of it.
        meeting = threading.Thread(target=self._meet_workers, args=(store, errors), daemon=True)
        if store is not None:
            meeting.start()
        with collecting(errors):
            if tell_engine is not None:
                tell_engine(init_info)
        if store is not None and not errors:
            meeting.join()  # no longer than the time-out of its rendezvous
        self.agree(errors)
        self.connected = True

    def send(self, deadline: float) -> None:
        """Send every bucket of the export; returns once their bytes are out.

        Exhausts the export even after an error, because the other ranks are in its collectives.
        """
        sender, errors = self._sender, []
        if sender is not None:
            sender.start()
        try:
            for tensors in self._export_buckets():
                if sender is not None and tensors and not errors:
                    with collecting(errors):
                        sender.send(tensors, deadline)
            if sender is not None and not errors:
                sender.finish()
        except Exception:
            if sender is not None:
                sender.abort()  # or the workers wait for this stage until their deadline
            raise
        if errors:
            raise errors[0]

    def agree(self, errors: Sequence[Exception]) -> None:
        """Raise EngineError on all ranks if any brought an error; the next sync then builds the
        transfer groups anew."""
        try:
            raise_together(errors, self._group)
        except Exception as error:
            self.close()
            raise EngineError(str(error)) from error

    def close(self) -> None:
        self.connected = False
        if self._sender is not None:
            self._sender.abort()
            self._sender = None

    def _meet_workers(self, store, errors: list[Exception]) -> None:
        with collecting(errors):
            communicator = make_communicator(
                self._backend, store, 0, 1 + self._num_workers, self._config.timeout_s
            )
            self._sender = WeightSender(communicator, self.manifest.stages[self._stage])

    def _reachable(self, leaders: list[tuple[int, str, int]]) -> list[tuple[str, int]]:
        """Where the engine, on rank 0's host, finds the leader of each stage: a leader on the same
        host at weight_sync.host, one elsewhere under its host name."""
        stages = sorted(stage for stage, _, _ in leaders)
        expected = list(range(len(self.manifest.stages)))
        assert stages == expected, f"leaders of the stages {stages}, the manifest has {expected}"
        host_of_rank_zero = leaders[0][1]  # leaders are in rank order, and rank 0 leads stage 0
        return [
            (self._config.host if host == host_of_rank_zero else host, port)
            for _, host, port in sorted(leaders)
        ]
