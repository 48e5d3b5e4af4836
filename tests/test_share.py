"""Buckets through shared memory to readers in other processes, some of which die or hang."""

import gc
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from megatron_eopd.errors import TransferError
from megatron_eopd.weight_sync.ring import Ring, RingReader
from megatron_eopd.weight_sync.share import HostShare, open_share
from tests.ring_peers import read, start, try_to_open, write_and_wait

NOBODY = 65534
SLOT_BYTES = 20_000
BUCKETS = [
    torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    for size in range(SLOT_BYTES - 50, SLOT_BYTES, 2)
]
"""Each of another length, so that an old one's end would be seen."""
SENT = [bucket.numpy().tobytes() for bucket in BUCKETS]
AT_ONCE_S = 2.0
"""Far below every time-out here, far above what a notice takes on a busy machine."""


@contextmanager
def ring_of(num_readers: int, timeout_s: float = 60) -> Iterator[Ring]:
    share = HostShare(SLOT_BYTES, 2)
    with closing(share), closing(Ring(share, num_readers, timeout_s)) as ring:
        yield ring


def write(ring: Ring, buckets: Sequence[torch.Tensor] = BUCKETS) -> None:
    for bucket in buckets:
        ring.next_slot(bucket.numel()).copy_(bucket)
        ring.publish(bucket.numel())


def start_reader(address, pause_s: float = 0.0, pause_at: int = -1):
    return start(read, address, len(BUCKETS), pause_s, pause_at)


def seconds_of(work: Callable, *arguments) -> float:
    begin = time.monotonic()
    work(*arguments)
    return time.monotonic() - begin


def test_every_reader_gets_all_buckets_bit_for_bit_through_two_slots():
    with ring_of(3) as ring:
        readers = [start_reader(address) for address in ring.addresses()]
        write(ring)
        ring.finish()
        assert all(pipe.recv() == SENT for _, pipe in readers)
        assert ring.has_readers


def test_a_slow_reader_holds_the_writer_back():
    """It sleeps between hearing of a bucket and copying it: nothing is overwritten before that."""
    pause_s = 0.01
    with ring_of(2) as ring:
        readers = [start_reader(a, p) for a, p in zip(ring.addresses(), (pause_s, 0), strict=True)]
        assert seconds_of(write, ring) > pause_s * (len(BUCKETS) - 2)
        ring.finish()
        assert all(pipe.recv() == SENT for _, pipe in readers)


def test_a_reader_that_is_killed_is_left_out_at_once():
    """While it waits for a bucket, and the writer for it; the others get everything."""
    with ring_of(3) as ring:
        addresses = ring.addresses()
        (victim, pipe), *others = (
            start_reader(addresses[0], pause_at=5),
            *map(start_reader, addresses[1:]),
        )
        write(ring, BUCKETS[:6])
        assert pipe.recv() == 5
        threading.Timer(0.2, victim.kill).start()
        assert seconds_of(write, ring, BUCKETS[6:]) < AT_ONCE_S
        ring.finish()
        assert all(pipe.recv() == SENT for _, pipe in others)
        assert ring.has_readers


def test_a_writer_without_readers_goes_on():
    with ring_of(1) as ring:
        victim, pipe = start_reader(ring.addresses()[0], pause_at=0)
        assert pipe.recv() == 0
        victim.kill()
        assert seconds_of(write, ring) < AT_ONCE_S
        assert not ring.has_readers
    with ring_of(0) as ring:
        write(ring)
        assert not ring.has_readers


def test_a_reader_that_is_held_is_left_out_after_the_time_out():
    """Once, not for each bucket. When it runs again it has an error, and not a later bucket."""
    with ring_of(2, timeout_s=0.5) as ring:
        (held, held_pipe), (_, pipe) = (
            start_reader(a, pause_at=n) for a, n in zip(ring.addresses(), (5, -1), strict=True)
        )
        write(ring, BUCKETS[:6])
        assert held_pipe.recv() == 5
        os.kill(held.pid, signal.SIGSTOP)
        assert 0.5 < seconds_of(write, ring, BUCKETS[6:]) < 0.5 + AT_ONCE_S
        ring.finish()
        assert pipe.recv() == SENT
    held_pipe.send("go on")
    os.kill(held.pid, signal.SIGCONT)
    assert isinstance(held_pipe.recv(), TransferError)


def test_a_reader_that_never_comes_is_left_out_after_the_time_out():
    with ring_of(2, timeout_s=0.3) as ring:
        _, pipe = start_reader(ring.addresses()[1], pause_at=0)
        assert pipe.recv() == 0, "this one is there"
        pipe.send("go on")
        assert 0.3 < seconds_of(write, ring) < 0.3 + AT_ONCE_S
        ring.finish()
        assert pipe.recv() == SENT


def test_a_killed_writer_ends_the_reader_at_once():
    """After what it has handed over."""
    writer, pipe = start(write_and_wait, 2)
    with closing(RingReader(address := pipe.recv())) as reader:
        assert [reader.take()[0].item() for _ in range(2)] == [0, 1]
        threading.Timer(0.2, writer.kill).start()
        with pytest.raises(TransferError, match="the trainer's process ended"):
            assert seconds_of(reader.take) < AT_ONCE_S
    writer.join()
    with pytest.raises(TransferError, match=r"the trainer's memory cannot be opened: .*No such"):
        RingReader(address)


def test_a_writer_that_gives_up_ends_the_reader_at_once():
    with ring_of(1) as ring, closing(RingReader(ring.addresses()[0])) as reader:
        write(ring, BUCKETS[:1])
        threading.Timer(0.2, ring.abort).start()
        assert torch.equal(reader.take(), BUCKETS[0])
        with pytest.raises(TransferError, match="the trainer gave up"):
            reader.take()


def test_file_descriptors_may_have_large_numbers():
    """As in a job with many connections: select(2) takes none above 1023."""
    fillers = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with ring_of(1) as ring, closing(RingReader(ring.addresses()[0])) as reader:
            assert reader.fileno() > 1023
            write(ring, BUCKETS[:2])
            assert [torch.equal(reader.take(), bucket) for bucket in BUCKETS[:2]] == [True] * 2
            ring.finish()
    finally:
        for filler in fillers:
            os.close(filler)


def sync_in_process(share: HostShare) -> None:
    with closing(Ring(share, 2, 5)) as ring:
        readers = [RingReader(address) for address in ring.addresses()]
        for bucket in BUCKETS[:3]:
            write(ring, [bucket])
            assert all(torch.equal(reader.take(), bucket) for reader in readers)
        ring.finish()
        for reader in readers:
            reader.close()


def held_by_this_process() -> tuple[int, int, list[str]]:
    """Open files, memory maps, and what anybody has in /dev/shm under a name like ours."""
    maps = Path("/proc/self/maps").read_text().count("memfd:eopd")
    names = [name for name in os.listdir("/dev/shm") if "eopd" in name]
    return len(os.listdir("/proc/self/fd")), maps, names


def test_nothing_is_left_after_many_syncs():
    """Of 200 over the same memory, and of memory that is made anew as often; a share of 2 × 1 MiB
    that stayed would be seen in the size of the process."""
    gc.collect()  # of what earlier tests held
    share = HostShare(1 << 20, 2)
    share.slot(0).fill_(1)
    sync_in_process(share)
    before, size = held_by_this_process(), psutil.Process().memory_info().rss
    for _ in range(200):
        sync_in_process(share)
    for _ in range(50):
        other = HostShare(1 << 20, 2)
        other.slot(0).fill_(1)
        sync_in_process(other)
        other.close()
        del other
    assert held_by_this_process() == before
    assert psutil.Process().memory_info().rss - size < 8 << 20
    share.close()
    share.close()


def test_an_aborted_sync_leaves_nothing_either():
    gc.collect()
    share = HostShare(64, 2)
    before = held_by_this_process()
    for _ in range(20):
        with closing(Ring(share, 3, 5)) as ring, closing(RingReader(ring.addresses()[1])):
            ring.next_slot(8)
            ring.publish(8)
            ring.abort()
    assert held_by_this_process() == before


# Who may read the weights.


def files_of(ring: Ring) -> list[int]:
    (address,) = ring.addresses()
    return [address["share"]["file"], address["told"], address["read"]]


def test_only_their_owner_may_open_memory_and_pipes():
    """By their permission bits."""
    with ring_of(1) as ring:
        for file in files_of(ring):
            assert stat.S_IMODE(os.fstat(file).st_mode) == 0o600


def test_they_have_no_name_and_nobody_listens_on_a_port():
    process = psutil.Process()
    connections, names = process.net_connections("all"), set(os.listdir("/dev/shm"))
    with ring_of(1) as ring, closing(RingReader(ring.addresses()[0])):
        memory, *pipes = (os.readlink(f"/proc/self/fd/{file}") for file in files_of(ring))
        assert memory == "/memfd:eopd-weights (deleted)"
        assert all(pipe.startswith("pipe:[") for pipe in pipes)
        assert process.net_connections("all") == connections
        new = set(os.listdir("/dev/shm")) - names
        assert not any(Path("/dev/shm", name).stat().st_size == 2 * SLOT_BYTES for name in new)


def test_no_process_inherits_them():
    with ring_of(1) as ring, closing(RingReader(ring.addresses()[0])) as reader:
        ends = [*files_of(ring), ring._readers[0]._told, ring._readers[0].read_pipe]
        own = [reader._told, reader._read]
        assert not any(os.get_inheritable(file) for file in (ends[0], *ends[3:], *own))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_can_open_neither_memory_nor_pipes():
    """Not even see which files are open; root itself can do all of it."""
    with ring_of(1) as ring:
        files = files_of(ring)
        _, root = start(try_to_open, 0, os.getpid(), files)
        _, nobody = start(try_to_open, NOBODY, os.getpid(), files)
        assert len(root.recv()) == 1 + 3 * len(files)
        assert nobody.recv() == []


def test_a_reader_cannot_change_what_others_read():
    """Its memory is mapped for reading only."""
    with closing(HostShare(64, 2)) as share:
        opened = open_share(share.handle())
        share.slot(1).fill_(7)
        assert opened.slot(3).eq(7).all(), "slots are counted modulo their number"
        place = f"{opened.slot(0).data_ptr():x}-"
        (line,) = (m for m in Path("/proc/self/maps").read_text().splitlines() if place in m)
        assert line.startswith(place) and line.split()[1] == "r--s"
