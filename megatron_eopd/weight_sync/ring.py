"""Buckets from one process to several readers on its host, through the slots of a Share.

    writer:  wait until slot n is free ─▶ fill it ─▶ tell every reader "n"
    reader:  hear "n" ─▶ copy slot n out ─▶ tell the writer "n is read"

Both are told on pipes that exist for one sync. A reader opens its ends as /proc/PID/fd/N, as it
opens the memory, and the writer then closes its own copies of them: so a process that dies closes
the pipe for good, and the other side notices at once. A reader that is lost or late is left out;
the others get their buckets all the same.
"""

import os
import struct
import time
from contextlib import suppress
from multiprocessing import connection
from typing import Any

import torch

from megatron_eopd.errors import TransferError
from megatron_eopd.weight_sync.share import Share, open_share, path_of

Address = dict[str, Any]
"""Of one reader, as JSON has it: the share's handle, and the pipes."""

_TOLD = struct.Struct("<qq")  # number of the bucket, bytes in its slot
_READ = struct.Struct("<q")
_ATTACHED, _ABORTED = -1, -1


class _Reader:
    """The writer's view of one."""

    def __init__(self) -> None:
        # "told" from the writer to the reader, "read" back.
        self.told_end, self._told = os.pipe2(os.O_CLOEXEC)
        self.read_pipe, self.read_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read_pipe, False)
        self.attached = False
        self.last_read = -1
        self.lost: str | None = None
        """Why it is left out."""

    def tell(self, number: int, num_bytes: int) -> None:
        if self.lost is None:
            with suppress(BrokenPipeError):  # `wait` finds that out, too
                os.write(self._told, _TOLD.pack(number, num_bytes))

    def wait(self, number: int, deadline: float) -> None:
        """Until it has read this bucket, or is lost."""
        while self.lost is None and self.last_read < number:
            left_s = deadline - time.monotonic()
            # By poll(2): select(2) takes no descriptor above 1023, and a large job has those.
            if connection.wait([self.read_pipe], max(left_s, 0)):
                self.hear()
            elif left_s <= 0:
                self.lost = "did not read its bucket in time"

    def hear(self) -> None:
        data = os.read(self.read_pipe, 64 * _READ.size)
        if not data:
            self.lost = "its process ended"
        for (number,) in _READ.iter_unpack(data):
            if self.attached:
                self.last_read = number
            else:
                self.attached = True
                self._close_its_ends()

    def _close_its_ends(self) -> None:
        for end in (self.told_end, self.read_end):
            os.close(end)

    def close(self) -> None:
        if not self.attached:
            self._close_its_ends()
        os.close(self._told)
        os.close(self.read_pipe)


class Ring:
    """The writer's end, for one sync."""

    def __init__(self, share: Share, num_readers: int, timeout_s: float) -> None:
        """`timeout_s`: longest wait for a reader to take one bucket."""
        self._share, self._timeout_s = share, timeout_s
        self._readers = [_Reader() for _ in range(num_readers)]
        self._next = 0

    def addresses(self) -> list[Address]:
        """One for each reader, to be opened by it alone."""
        return [
            {
                "share": self._share.handle(),
                "pid": os.getpid(),
                "told": reader.told_end,
                "read": reader.read_end,
            }
            for reader in self._readers
        ]

    @property
    def has_readers(self) -> bool:
        return any(reader.lost is None for reader in self._readers)

    def leave_out_absent(self) -> None:
        """Readers that have not attached will not: they were asked to, and their engine answered
        for the others. One that died before would otherwise be waited for."""
        for reader in self._readers:
            if connection.wait([reader.read_pipe], 0):
                reader.hear()
            if not reader.attached:
                reader.lost = "did not open the memory"

    def next_slot(self, num_bytes: int) -> torch.Tensor:
        """To be filled and published: once every reader has read what was there, or is lost."""
        self._wait_for(self._next - self._share.num_slots)
        return self._share.slot(self._next)[:num_bytes]

    def publish(self, num_bytes: int) -> None:
        """The slot is filled."""
        self._share.settle()  # or readers would see what was there before
        for reader in self._readers:
            reader.tell(self._next, num_bytes)
        self._next += 1

    def finish(self) -> None:
        """Returns when every reader has read all, so that the memory may be used again."""
        self._wait_for(self._next - 1)

    def abort(self) -> None:
        """Let go of readers that wait for more."""
        for reader in self._readers:
            reader.tell(_ABORTED, 0)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _wait_for(self, number: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        for reader in self._readers:
            reader.wait(number, deadline)


class RingReader:
    def __init__(self, address: Address) -> None:
        """
        Raises:
            TransferError: the writer is gone, or is another user's.
        """
        self._told, self._read, self._share = -1, -1, None
        try:
            self._share = open_share(address["share"])
            self._told = os.open(path_of(address["pid"], address["told"]), os.O_RDONLY)
            self._read = os.open(path_of(address["pid"], address["read"]), os.O_WRONLY)
        except OSError as error:
            self.close()
            raise TransferError(f"the trainer's memory cannot be opened: {error}") from None
        self._say(_ATTACHED)

    def fileno(self) -> int:
        """Readable when there is a bucket to take; for multiprocessing.connection.wait."""
        return self._told

    def take(self) -> torch.Tensor:
        """A copy of the next bucket, uint8 on the reader's device; its slot is free then.

        A copy, because vLLM's layerwise reload keeps views until a layer is complete, which may be
        a bucket later.

        Raises:
            TransferError: the writer gave up, or its process ended.
        """
        data = os.read(self._told, _TOLD.size)
        if not data:
            raise TransferError("the trainer's process ended")
        number, num_bytes = _TOLD.unpack(data)
        if number == _ABORTED:
            raise TransferError("the trainer gave up")
        slot = self._share.slot(number)[:num_bytes]
        # Onto the reader's own GPU and by its own stream, for which `settle` waits: the slot may
        # lie on another one.
        own = torch.device("cuda", torch.cuda.current_device()) if slot.is_cuda else slot.device
        copy = slot.to(own, copy=True)
        self._share.settle()
        self._say(number)
        return copy

    def close(self) -> None:
        for end in (self._told, self._read):
            if end >= 0:
                os.close(end)
        self._told, self._read = -1, -1
        if self._share is not None:
            self._share.close()

    def _say(self, number: int) -> None:
        try:
            os.write(self._read, _READ.pack(number))
        except BrokenPipeError:
            raise TransferError("the trainer's process ended") from None
