"""One job at a time in a run's folder. In: RUN_DIR. Out: a lock while the block runs.

RUN_DIR/lock.json says whose it is and beats every few seconds. A job that comes second and sees it
beat is told who is there. One that sees no beat takes the folder over: the job before it was
killed, and its requeued self must not stand before a closed door. Beats are compared with each
other and with no clock, so hosts need not agree on the time.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_eopd.errors import ConfigError

LOCK = "lock.json"
BEAT_S = 5.0
SILENT_S = 4 * BEAT_S
"""Without a beat for so long a job counts as dead, unless it is on this host and alive."""

Owner = dict[str, Any]
"""What the lock says of its job."""


@contextmanager
def run_lock(
    run_dir: Path, *, beat_s: float = BEAT_S, silent_s: float = SILENT_S
) -> Iterator[None]:
    """Waits up to `silent_s` for an owner that does not beat.

    Raises:
        ConfigError: another job works there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK
    own = {"host": socket.gethostname(), "pid": os.getpid(), "namespace": _namespace()}
    own |= {"started": _started(os.getpid()), "job": uuid.uuid4().hex, "beat": 0}
    _acquire(path, own, dead=_refuse_the_living(path, silent_s))
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, own, done, beat_s), daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()
        if (_read(path) or {}).get("job") == own["job"]:
            path.unlink(missing_ok=True)


def _refuse_the_living(path: Path, silent_s: float) -> Owner | None:
    """The owner that was found dead; None where there is no lock."""
    first = _read(path)
    if first is None:
        return None
    if (first.get("host"), first.get("namespace")) == (socket.gethostname(), _namespace()):
        if _started(first.get("pid")) == first.get("started"):
            raise _taken(path, first)
        return first
    deadline = time.monotonic() + silent_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, silent_s / 10))
        now = _read(path)
        if now is None:
            return None
        if now != first:
            raise _taken(path, now)
    return first


def _acquire(path: Path, own: Owner, dead: Owner | None) -> None:
    """Of several that find the folder free at once, one gets it: a link is made or is not."""
    if dead is not None:
        aside = path.with_name(f"{path.name}.{own['job']}.dead")
        with suppress(FileNotFoundError):  # another one was faster
            os.rename(path, aside)
            if _read(aside) != dead:  # it has come since, and lives
                with suppress(FileExistsError):
                    os.link(aside, path)
            aside.unlink()
    unfinished = path.with_name(f"{path.name}.{own['job']}")
    try:
        unfinished.write_text(json.dumps(own))
        os.link(unfinished, path)
    except FileExistsError:
        raise _taken(path, _read(path) or {}) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _taken(path: Path, owner: Owner) -> ConfigError:
    return ConfigError(
        f"run_dir={path.parent}: another job works there, process {owner.get('pid')} on "
        f"{owner.get('host')} (by {path}). Wait for it or end it, or set another run_dir."
    )


def _namespace() -> str:
    """Of process numbers: two containers may have one host name, and each its own process 7."""
    return os.readlink("/proc/self/ns/pid")


def _started(pid: Any) -> str | None:
    """When a process began, in ticks since the boot; None if there is none. Numbers come again."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]  # field 22 of proc(5), behind the name


def _beat(path: Path, own: Owner, done: threading.Event, beat_s: float) -> None:
    while not done.wait(beat_s):
        if (_read(path) or own).get("job") != own["job"]:
            return  # it was silent for too long, held or cut off from its disk, and lost its place
        own["beat"] += 1
        try:
            _write(path, own)
        except OSError:  # a full disk is told by what the run itself writes
            continue


def _read(path: Path) -> Owner | None:
    """None where there is no lock; a damaged one is nobody's."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, own: Owner) -> None:
    unfinished = path.with_name(f"{path.name}.{own['job']}")
    try:
        unfinished.write_text(json.dumps(own))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
