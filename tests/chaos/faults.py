"""What can happen to a run, and when. A fault is a row of FAULTS, a moment one of MOMENTS.

In: a living start, or between two starts a run's newest checkpoint. Out: what was done, in words.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil

from tests.chaos.start import Start

BALLAST = "ballast"
"""What fills a run's disk."""
SMALL_FILE = 100_000
"""Bytes. Logs and metrics stay below it, a checkpoint's data does not."""


@dataclass(frozen=True)
class Moment:
    is_there: Callable[[Start], bool]
    """Looking at what the start has left since it was armed."""
    longest_delay_s: float


MOMENTS = {
    "start-up": Moment(lambda start: True, 8.0),
    "load": Moment(lambda start: "starts: at iteration" in start.new_log(), 0.4),
    # Behind a step line: what is left of the save, and the stages of the next iteration.
    "iteration": Moment(lambda start: start.has_new_step(), 1.5),
    "save": Moment(lambda start: start.is_saving(), 0.3),
    "export": Moment(lambda start: start.is_exporting(), 0.05),
}
RUNNING = ("iteration", "save", "iteration")
ANY_TIME = ("start-up", "load", *RUNNING, "export")


@dataclass(frozen=True)
class Fault:
    name: str
    act: Callable[[Start, Random], str] | None = None
    """On a living start. Raises NoSuchProcess where what it is about is not there yet."""
    damage: Callable[[Path, Random], str] | None = None
    """Of one file of a checkpoint, between two starts."""
    moments: tuple[str, ...] = ()
    needs_engine: bool = False
    needs_own_disk: bool = False
    may_meet_engine: bool = True
    is_survived: bool = False
    """Whether the start has to go on by itself."""
    needs_bytes: bool = True
    """Whether an empty file cannot be damaged so."""
    limit_s: float = 60.0
    """Within which a start has ended, or where it survives has finished another iteration."""


def kill_rank(start: Start, rng: Random) -> str:
    return _kill(rng.choice(start.ranks()))


def kill_engine(start: Start, rng: Random) -> str:
    return _kill(rng.choice(start.engines()))


def hold_and_kill_engine(start: Start, rng: Random) -> str:
    """It does not answer what it is asked next, and dies in the middle of that."""
    engine = rng.choice(start.engines())
    engine.suspend()
    time.sleep(rng.uniform(1, 3))
    return _kill(engine) + ", held before"


def hold_engine_for_good(start: Start, rng: Random) -> str:
    """It lives, and says nothing any more."""
    engine = rng.choice(start.engines())
    engine.suspend()
    return _name(engine)


def kill_torchrun(start: Start, rng: Random) -> str:
    start.torchrun.kill()
    return "torchrun"


def kill_all(start: Start, rng: Random) -> str:
    processes = start.processes()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return f"{len(processes)} processes"


def _kill(process: psutil.Process) -> str:
    name = _name(process)
    process.kill()
    return name


def _name(process: psutil.Process) -> str:
    rank = process.environ().get("RANK", "")
    return f"rank {rank}" if rank else "engine"


def terminate(start: Start, rng: Random) -> str:
    start.torchrun.terminate()
    return "torchrun"


def terminate_twice(start: Start, rng: Random) -> str:
    start.torchrun.terminate()
    time.sleep(rng.uniform(0, 4))  # a second one soon behind the first counts as the same
    start.torchrun.terminate()
    return "torchrun"


def interrupt(start: Start, rng: Random) -> str:
    start.torchrun.send_signal(signal.SIGINT)
    return "torchrun"


def warn_ranks(start: Start, rng: Random) -> str:
    ranks = start.ranks()
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(signal.SIGUSR1)
    return f"{len(ranks)} ranks"


def hold_rank(start: Start, rng: Random) -> str:
    rank, seconds = rng.choice(start.ranks()), rng.uniform(1, 4)
    number = rank.environ()["RANK"]
    rank.suspend()
    time.sleep(seconds)
    rank.resume()
    return f"rank {number} for {seconds:.1f} s"


def hold_rank_for_good(start: Start, rng: Random) -> str:
    rank = rng.choice(start.ranks())
    rank.suspend()
    return f"rank {rank.environ()['RANK']}"


def fill_disk(start: Start, rng: Random) -> str:
    """To the last byte: it is a file system of the run's own."""
    with (start.run_dir / BALLAST).open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**16)):
            pass
    return "nothing free"


def limit_files(start: Start, rng: Random) -> str:
    """As `ulimit -f` does: a write past it fails in the middle of a file, as on a full disk."""
    for rank in start.ranks():
        rank.rlimit(psutil.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))
    return f"{SMALL_FILE:,} bytes a file"


def flip_bit(path: Path, rng: Random) -> str:
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place:,}"


def truncate(path: Path, rng: Random) -> str:
    size, left = path.stat().st_size, rng.randrange(path.stat().st_size)
    os.truncate(path, left)
    return f"{left:,} of {size:,} bytes left"


def empty(path: Path, rng: Random) -> str:
    os.truncate(path, 0)
    return "0 bytes left"


def remove(path: Path, rng: Random) -> str:
    path.unlink()
    return "gone"


# It starts again beside ranks that go on, which may have to wait for it.
OF_AN_ENGINE = {"moments": RUNNING, "needs_engine": True, "is_survived": True, "limit_s": 200.0}
FAULTS = (
    Fault("SIGKILL of a rank", kill_rank, moments=ANY_TIME),
    Fault("SIGKILL of an engine", kill_engine, **OF_AN_ENGINE),
    Fault("engine held, then SIGKILL", hold_and_kill_engine, **OF_AN_ENGINE),
    Fault("SIGSTOP of an engine", hold_engine_for_good, **OF_AN_ENGINE),
    Fault("SIGKILL of torchrun", kill_torchrun, moments=ANY_TIME),
    Fault("SIGKILL of all", kill_all, moments=ANY_TIME),
    Fault("SIGTERM", terminate, moments=ANY_TIME),
    Fault("SIGTERM twice", terminate_twice, moments=RUNNING),
    Fault("SIGINT", interrupt, moments=RUNNING),
    Fault("SIGUSR1 to the ranks", warn_ranks, moments=RUNNING),
    Fault("SIGSTOP, SIGCONT of a rank", hold_rank, moments=ANY_TIME[1:], is_survived=True),
    # An engine may take its time, and ranks wait for it that long.
    Fault(
        "SIGSTOP of a rank",
        hold_rank_for_good,
        moments=RUNNING,
        may_meet_engine=False,
        limit_s=150.0,  # the ranks' time-out, and torchrun's before it sends SIGKILL
    ),
    # The disk stays full for each start that torchrun makes of them.
    Fault("disk full", fill_disk, moments=RUNNING, needs_own_disk=True, limit_s=120.0),
    Fault("file size limit", limit_files, moments=RUNNING, limit_s=120.0),
    Fault("bit flip", damage=flip_bit),
    Fault("truncation", damage=truncate),
    Fault("file emptied", damage=empty),
    Fault("file removed", damage=remove, needs_bytes=False),
)


def pick_file(checkpoint: Path, seen: Counter[str], rng: Random, *, with_bytes: bool) -> Path:
    """Of the kind that was damaged least often so far. `seen`: kinds → how often."""
    files = [p for p in sorted(checkpoint.iterdir()) if p.stat().st_size or not with_bytes]
    rng.shuffle(files)
    chosen = min(files, key=lambda path: seen[kind_of(path)])
    seen[kind_of(chosen)] += 1
    return chosen


def kind_of(path: Path) -> str:
    return path.suffix if path.suffix == ".distcp" else path.name
