"""Whether processes are alive, for tests that see them die."""

import time
from collections.abc import Callable, Collection
from contextlib import suppress

import psutil


def is_alive(process: psutil.Process) -> bool:
    """A process that has ended, and whose parent has not asked yet, is a zombie."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_until_gone(living: Callable[[], Collection[psutil.Process]], seconds: float) -> None:
    """`living`: those that are left."""
    deadline = time.monotonic() + seconds
    while left := living():
        assert time.monotonic() < deadline, f"after {seconds} s there is still {left}"
        time.sleep(0.02)
