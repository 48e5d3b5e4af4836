"""What one rank does in a weight sync: hand its stage's buckets over, or those of other hosts on.

In: an export of the student's tensors, bucket by bucket, or what a stage's leader on another host
sends. Out: the buckets' bytes in this host's memory, where the engines' workers read them. The
student's ranks have an Outlet each, and of other hosts with engines one rank.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch

from megatron_eopd.errors import TransferError, WireError
from megatron_eopd.parallel.collectives import collecting
from megatron_eopd.parallel.wire import JointWire
from megatron_eopd.weight_sync.buckets import buffer_bytes, pack
from megatron_eopd.weight_sync.manifest import Bucket, Manifest
from megatron_eopd.weight_sync.ring import Address, Ring
from megatron_eopd.weight_sync.route import StageRoute
from megatron_eopd.weight_sync.share import Share, make_share

ExportBuckets = Callable[[], Iterator[list[torch.Tensor]]]
NUM_SLOTS = 2
"""One is filled while the other is read."""


@dataclass
class TransferTimes:
    """Seconds that a rank spent in the parts of a sync."""

    gather: float = 0.0
    """In the export."""
    hop: float = 0.0
    """In sending to other hosts, or in receiving from the leader."""
    hand_over: float = 0.0
    """In copying to the memory that engines read, with checksums."""
    wait: float = 0.0
    """For engines that load what they have read, before more can be handed over."""

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        setattr(self, part, getattr(self, part) + time.monotonic() - begin)


class Passage:
    """Of one stage's buckets through one rank: out of its export or off the wire, and into memory.

    On a wire to other hosts every bucket follows a word that says whether it comes at all.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        wire: JointWire | None,
        device: torch.device,
        timeout_s: float,
        leads: bool,
    ) -> None:
        """`wire`: to the ranks of other hosts, the stage's leader first. `leads`: whether this is
        the leader."""
        self._buckets, self._wire, self._device = buckets, wire, device
        self._timeout_s, self._leads = timeout_s, leads
        self._share: Share | None = None
        self._ring: Ring | None = None
        self._next = 0
        self._aborted = False

    def open(self, num_readers: int) -> list[Address]:
        """Begin a sync. What reads here gets these addresses."""
        self._next, self._aborted = 0, False
        if self._share is None:
            slot_bytes = max(map(buffer_bytes, self._buckets))
            self._share = make_share(self._device, slot_bytes, NUM_SLOTS)
        if self._ring is not None:
            self._ring.close()
        self._ring = Ring(self._share, num_readers, self._timeout_s)
        return self._ring.addresses()

    def begin(self) -> None:
        """What is to read here has opened its addresses by now, or never will."""
        self._ring.leave_out_absent()

    def send(self, tensors: Sequence[torch.Tensor], times: TransferTimes) -> None:
        """The next bucket, by the stage's leader.

        Raises:
            ValueError: the tensors are not the ones of the manifest.
            WireError: another host is gone or late.
        """
        if self._next == len(self._buckets):
            raise ValueError(f"a bucket more than the manifest's {len(self._buckets)}")
        bucket = self._buckets[self._next]
        with times.measure("wait"):
            slot = self._ring.next_slot(buffer_bytes(bucket))
        if self._wire is None and not self._ring.has_readers:
            self._next += 1
            return
        with times.measure("hand_over"):
            pack(bucket, tensors, slot)
        with times.measure("hop"):
            if self._wire is not None:
                self._wire.broadcast(torch.ones(1, device=self._device))
                self._wire.broadcast(slot)
        self._hand_over(slot, times)

    def forward_all(self, times: TransferTimes) -> None:
        """Every bucket, by a rank of another host than the leader's.

        Raises:
            TransferError: the leader gave up.
            WireError: it is gone or late.
        """
        for bucket in self._buckets:
            with times.measure("wait"):
                slot = self._ring.next_slot(buffer_bytes(bucket))
            with times.measure("hop"):
                comes = torch.empty(1, device=self._device)
                self._wire.broadcast(comes)
                if not comes.item():
                    raise TransferError("the leader of the stage gave up, and says why")
                self._wire.broadcast(slot)
            self._hand_over(slot, times)

    def finish(self, times: TransferTimes) -> None:
        """Every reader has read all, or is left out.

        Raises:
            ValueError: there were fewer buckets than the manifest has.
        """
        if self._next < len(self._buckets):
            raise ValueError(
                f"{self._next} buckets were exported, and the manifest has {len(self._buckets)}"
            )
        with times.measure("wait"):
            self._ring.finish()
        if self._device.type == "cuda":  # the trainer needs its memory
            self._share.close()
            self._share = None

    def abort(self) -> None:
        """Let go of all who wait for more."""
        self._ring.abort()
        others_wait = self._leads and self._wire is not None and self._next < len(self._buckets)
        if others_wait and not self._aborted:
            self._aborted = True  # a second word would be taken for one of the next sync
            with suppress(WireError):
                self._wire.broadcast(torch.zeros(1, device=self._device))

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._share is not None:
            self._share.close()
            self._share = None

    def _hand_over(self, slot: torch.Tensor, times: TransferTimes) -> None:
        with times.measure("hand_over"):
            self._ring.publish(slot.numel())
        self._next += 1


class Outlet:
    def __init__(
        self,
        manifest: Manifest,
        routes: Sequence[StageRoute],
        wires: Sequence[JointWire | None],
        *,
        rank: int,
        node: int,
        own_stage: int | None,
        export_buckets: ExportBuckets | None,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        """`wires`: of each stage that crosses hosts, joined by the ranks of its route. `rank`: of
        the job. `own_stage`, `export_buckets`: on the student's ranks, all of which take part in
        the export of their stage."""
        self._own_stage, self._export_buckets = own_stage, export_buckets
        self._leads = own_stage is not None and routes[own_stage].leader == rank
        self._passages = {
            stage: Passage(
                manifest.stages[stage], wires[stage], device, timeout_s, leads=route.leader == rank
            )
            for stage, route in enumerate(routes)
            if rank in route.hop
        }
        self._hands_over = [s for s, route in enumerate(routes) if route.writers.get(node) == rank]

    def open(self, num_readers: int) -> dict[int, list[Address]]:
        """Begin a sync with so many engine workers on this host. By stage that this rank hands
        over here: their addresses."""
        return {
            stage: addresses
            for stage, passage in self._passages.items()
            for addresses in [passage.open(num_readers if stage in self._hands_over else 0)]
            if stage in self._hands_over
        }

    def run(self) -> TransferTimes:
        """The way of all buckets, stage after stage: where stages cross hosts, a rank may lead one
        and forward another, and whom it waits for must not wait for it.

        Raises:
            Exception: the first of this rank's; who waited for more was told.
        """
        times, errors = TransferTimes(), []
        for passage in self._passages.values():
            passage.begin()
        last = max([*self._passages, self._own_stage or 0])
        for stage in range(last + 1):
            if stage == self._own_stage:
                with collecting(errors):
                    self._export(times)
            elif stage in self._passages:
                passage = self._passages[stage]
                with collecting(errors), _aborting(passage):
                    passage.forward_all(times)
                    passage.finish(times)
        if errors:
            raise errors[0]
        return times

    def close(self) -> None:
        for passage in self._passages.values():
            passage.close()

    def _export(self, times: TransferTimes) -> None:
        """Exhausts the export even after an error, because other ranks are in its collectives."""
        passage = self._passages.get(self._own_stage) if self._leads else None
        own: list[Exception] = []
        with collecting(own), nullcontext() if passage is None else _aborting(passage):
            for tensors in self._timed(self._export_buckets(), times):
                if passage is not None and tensors and not own:
                    with collecting(own), _aborting(passage):
                        passage.send(tensors, times)
            if passage is not None and not own:
                passage.finish(times)
        if own:
            raise own[0]

    def _timed(
        self, buckets: Iterable[list[torch.Tensor]], times: TransferTimes
    ) -> Iterator[list[torch.Tensor]]:
        buckets = iter(buckets)
        while True:
            with times.measure("gather"):
                tensors = next(buckets, None)
            if tensors is None:
                return
            yield tensors


@contextmanager
def _aborting(passage: Passage) -> Iterator[None]:
    """After an exception of the block nobody is left waiting."""
    try:
        yield
    except Exception:
        passage.abort()
        raise
