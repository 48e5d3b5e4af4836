"""Work that leaves time to others. In: a share of the time. Out: sleep, in between."""

import threading
import time


class Pace:
    """Called between pieces of work, sleeps so long that all of it takes `share` of the time."""

    def __init__(self, share: float = 1.0) -> None:
        self._rest = 1 / share - 1
        self._hurried = threading.Event()
        self._worked_since = time.monotonic()
        self.slept_s = 0.0

    def __call__(self) -> None:
        begin = time.monotonic()
        self._hurried.wait((begin - self._worked_since) * self._rest)
        self._worked_since = time.monotonic()
        self.slept_s += self._worked_since - begin

    def hurry(self) -> None:
        """Somebody waits for it: no more sleep, that of this moment included."""
        self._hurried.set()
