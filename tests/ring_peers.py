"""The other processes of tests of a ring: readers, a writer, and a process of another user.

Started from a server that has imported torch once, see `start`.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from megatron_eopd.errors import TransferError
from megatron_eopd.weight_sync.ring import Address, Ring, RingReader
from megatron_eopd.weight_sync.share import HostShare

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ring_peers"])


def start(work: Callable, *arguments) -> tuple[BaseProcess, Connection]:
    """`work(*arguments, pipe)` in a process of its own, and the other end of the pipe."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_run, args=(work, arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _run(work: Callable, arguments: tuple, pipe: Connection) -> None:
    torch.set_num_threads(1)
    with suppress(BrokenPipeError):  # a test that has failed does not listen
        work(*arguments, pipe)


def read(address: Address, count: int, pause_s: float, pause_at: int, pipe: Connection) -> None:
    """Take `count` buckets and send their bytes, or the error. `pause_s` between hearing of a
    bucket and copying it; once `pause_at` are taken, send that, and never go on unless told to."""
    taken: list[bytes] = []
    try:
        reader = RingReader(address)
        slot = reader._share.slot
        reader._share.slot = lambda number: time.sleep(pause_s) or slot(number)
        while len(taken) < count:
            if len(taken) == pause_at:
                pipe.send(pause_at)
                pipe.recv()
            taken.append(reader.take().numpy().tobytes())
        reader.close()
    except TransferError as error:
        pipe.send(error)
    else:
        pipe.send(taken)


def write_and_wait(buckets: int, pipe: Connection) -> None:
    """Hand a few buckets over to one reader, and then nothing more."""
    ring = Ring(HostShare(64, 2), num_readers=1, timeout_s=60)
    pipe.send(ring.addresses()[0])
    for number in range(buckets):
        ring.next_slot(64).fill_(number)
        ring.publish(64)
    pipe.recv()


def try_to_open(user: int, pid: int, files: Sequence[int], pipe: Connection) -> None:
    """As this user: send what could be done to files that process `pid` has open."""
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    done = []

    def attempt(what: str, work: Callable, *arguments) -> None:
        with suppress(PermissionError):
            work(*arguments)
            done.append(what)

    attempt("list", os.listdir, f"/proc/{pid}/fd")
    for file in files:
        path = f"/proc/{pid}/fd/{file}"
        attempt(f"link {file}", os.readlink, path)
        attempt(f"read {file}", os.open, path, os.O_RDONLY | os.O_NONBLOCK)
        attempt(f"write {file}", os.open, path, os.O_WRONLY | os.O_NONBLOCK)
    pipe.send(done)
