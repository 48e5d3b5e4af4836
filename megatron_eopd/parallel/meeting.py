"""How the ranks of one start of a job meet on torchrun's store.

torchrun keeps its store through --max-restarts, with all that the ranks before have left in it:
addresses of processes that are dead. So the ranks that meet agree on a part of it that nobody has
used. TORCHELASTIC_RESTART_COUNT would not do: each node counts for itself, and failures alone.
"""

import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore

from megatron_eopd.errors import LostRankError

CONNECT_TIMEOUT_S = 30.0
STOPPED, BEGAN = "run/stopped", "run/began"
POLL_S = 0.02


def require_torchrun() -> None:
    """A client of its store would try for as long as ranks may wait for each other.

    Raises:
        LostRankError: this rank's torchrun ended while the rank started.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise LostRankError(
            f"torchrun has ended, its store does not answer at {host}:{port}: {error}. Start the "
            f"same command again."
        ) from None


def torchrun_store() -> dist.Store | None:
    """What all starts of one job share; None without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
    return dist.TCPStore(host, port, is_master=False, timeout=timeout)


def note_stop(store: dist.Store, reason: str) -> None:
    """Whatever torchrun starts after this shall not begin: see `stopped_before`."""
    store.set(STOPPED, reason)


def stopped_before(store: dist.Store) -> str | None:
    """Why the job was asked to stop, if it was."""
    return store.get(STOPPED).decode() if store.check([STOPPED]) else None


def began_at(store: dist.Store, now: float) -> float:
    """When the job's first start was, by time.time() of the host that was first to ask. `now`: the
    answer to the first one."""
    return float(store.compare_set(BEGAN, "", str(now)).decode())


def fresh_part(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of `store` that no ranks before these have used. Returns when all have come.

    Every rank asks under a word of its own, so that it cannot take the answer to an earlier start
    for its own. Nobody is left of that start: torchrun ends all ranks before it starts new ones.

    Raises:
        LostRankError: naming the ranks that have not come in time.
    """
    if rank == 0:
        start = str(store.add("starts", 1))
        _answer(store, start, world_size, timeout)
    else:
        word = uuid.uuid4().hex
        store.set(f"ask/{rank}", word)
        try:
            start = store.get(f"answer/{word}").decode()
        except dist.DistError as error:
            raise _late("rank 0", timeout) from error
        store.set(f"met/{start}/{rank}", "")
    return PrefixStore(f"start/{start}", store)


def _answer(store: dist.Store, start: str, world_size: int, timeout: timedelta) -> None:
    """By rank 0, until all others have read it."""
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for rank in missing:
            if store.check([f"ask/{rank}"]):  # maybe still the word of an earlier start
                store.set(f"answer/{store.get(f'ask/{rank}').decode()}", start)
        missing = {rank for rank in missing if not store.check([f"met/{start}/{rank}"])}
        if missing and time.monotonic() > deadline:
            raise _late(f"ranks {sorted(missing)}", timeout)
        time.sleep(POLL_S if missing else 0)


def _late(who: str, timeout: timedelta) -> LostRankError:
    minutes = timeout.total_seconds() / 60
    return LostRankError(
        f"{who} did not come within parallel.distributed_timeout_minutes={minutes:g}. Look for "
        f"the first error above, or set a longer time."
    )
