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
    _refuse_the_living(path, silent_s)
    _acquire(path, own)
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


def _refuse_the_living(path: Path, silent_s: float) -> None:
    first = _read(path)
    if first is None:
        return
    if (first.get("host"), first.get("namespace")) == (socket.gethostname(), _namespace()):
        if _started(first.get("pid")) == first.get("started"):
            raise _taken(path, first)
        return
    deadline = time.monotonic() + silent_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, silent_s / 10))
        now = _read(path)
        if now is None:
            return
        if now != first:
            raise _taken(path, now)


def _acquire(path: Path, own: dict[str, Any]) -> None:
    """Of several that find the folder free at once, one gets it: a link is made or is not."""
    dead, unfinished = _read(path), path.with_name(f"{path.name}.{own['job']}")
    if path.exists():
        with suppress(FileNotFoundError):  # another one was faster
            os.rename(path, unfinished)
            if (_read(unfinished) or {}).get("job") != (dead or {}).get("job"):
                os.replace(unfinished, path)  # it has come just now, and is none of the dead
    unfinished.write_text(json.dumps(own))
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise _taken(path, _read(path) or {}) from None
    finally:
        unfinished.unlink()


def _taken(path: Path, owner: dict[str, Any]) -> ConfigError:
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


def _beat(path: Path, own: dict[str, Any], done: threading.Event, beat_s: float) -> None:
    while not done.wait(beat_s):
        own["beat"] += 1
        try:
            _write(path, own)
        except OSError:  # a full disk is told by what the run itself writes
            continue


def _read(path: Path) -> dict[str, Any] | None:
    """None where nobody is; damaged ones have no owner."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, own: dict[str, Any]) -> None:
    unfinished = path.with_name(f"{path.name}.{own['job']}")
    unfinished.write_text(json.dumps(own))
    os.replace(unfinished, path)
