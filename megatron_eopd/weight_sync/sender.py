"""The trainer's side of a weight sync, on the leader of one pipeline stage.

In: buckets of whole tensors, gathered already. Out: their bytes, in the manifest's order, on the
stage's transfer group. Every transfer has a deadline; after a failure the sender is dead and its
group must be built again.
"""

import threading
import time
from collections.abc import Sequence

import torch

from megatron_eopd.weight_sync.buckets import pack
from megatron_eopd.weight_sync.communicator import Communicator, TransferError
from megatron_eopd.weight_sync.manifest import Bucket


class WeightSender:
    def __init__(self, communicator: Communicator, buckets: Sequence[Bucket]):
        self._communicator = communicator
        self._buckets = buckets
        self._next = 0
        self.dead = False

    def start(self) -> None:
        """Begin a sync: the next bucket is the first of the manifest."""
        self._next = 0

    def send(self, tensors: Sequence[torch.Tensor], deadline: float) -> None:
        """Send the next bucket; returns once its bytes are out. `deadline` is in time.monotonic().

        Raises:
            ValueError: the tensors are not the ones of the manifest.
            TransferError: the engine is gone or does not take the bytes in time.
        """
        try:
            if self._next == len(self._buckets):
                raise ValueError(f"a bucket more than the manifest's {len(self._buckets)}")
            # Packing copies, and a copy of tensors that a gather still writes would be stale
            # bytes: the caller hands over a bucket only when its gather has finished.
            buffer = pack(self._buckets[self._next], tensors, self._communicator.device)
            self._broadcast(buffer, deadline)
        except Exception:
            self.abort()  # or the workers wait for this stage until their own deadline
            raise
        self._next += 1

    def finish(self) -> None:
        if self._next < len(self._buckets):
            raise ValueError(
                f"{self._next} buckets were exported, and the manifest has {len(self._buckets)}"
            )

    def abort(self) -> None:
        """Let go of the engine's workers that wait for this stage."""
        self.dead = True
        self._communicator.abort()

    def close(self) -> None:
        self._communicator.close()

    def _broadcast(self, buffer: torch.Tensor, deadline: float) -> None:
        """On a daemon thread, because a stuck NCCL transfer cannot be interrupted, and the thread
        that holds the deadline must stay free to abort it."""
        failures: list[Exception] = []

        def transfer() -> None:
            try:
                remaining = deadline - time.monotonic()
                self._communicator.broadcast(buffer, timeout_s=remaining)
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=transfer, name="weight-sync", daemon=True)
        thread.start()
        thread.join(max(deadline - time.monotonic(), 0))
        if thread.is_alive():
            raise TransferError(
                f"bucket {self._next + 1} of {len(self._buckets)} ({buffer.nbytes:,} bytes) was "
                "not taken in time; raise weight_sync.timeout_s if the engine is only slow"
            )
        if failures:
            raise failures[0]
