"""A sink on a thread of its own, whose faults cost the run neither time nor its life.

Whatever goes wrong there (network gone, disk full, a service that hangs) is told once, and the sink
is left out from then on.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from queue import Full, Queue
from threading import Thread

from megatron_eopd.metrics.sinks.sink import Options, Sink
from megatron_eopd.records import Histogram

MOST_WAITING = 256
"""Calls; a sink that is further behind is given up."""
CLOSE_S = 20.0
"""A run that was told to stop has 25 to 30 s in all."""


class Background:
    """A Sink. All calls return at once; the thread makes them in their order."""

    def __init__(
        self, name: str, sink: Sink, tell: Callable[[str], None], close_s: float = CLOSE_S
    ) -> None:
        """`tell`: called with a warning, on the caller's own thread."""
        self._name, self._sink, self._tell, self._close_s = name, sink, tell, close_s
        self._calls: Queue[Callable[[], None] | None] = Queue(MOST_WAITING)
        self._error: Exception | None = None
        self._is_left_out = False
        self._thread = Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def about(self, options: Options) -> None:
        self._later(partial(self._sink.about, options))

    def write(
        self, iteration: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
    ) -> None:
        self._later(partial(self._sink.write, iteration, scalars, histograms))

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._later(partial(self._sink.text, iteration, name, markdown))

    def close(self, *, is_complete: bool) -> None:
        """Waits, but not for ever."""
        deadline = time.monotonic() + self._close_s
        self._later(partial(self._sink.close, is_complete=is_complete))
        if not self._is_left_out:
            with suppress(Full):
                self._calls.put(None, timeout=self._close_s)
            self._thread.join(max(deadline - time.monotonic(), 0))
            if self._thread.is_alive():
                self._leave_out(f"it has not finished within {self._close_s:g} s")
        self._look()

    def _later(self, call: Callable[[], None]) -> None:
        self._look()
        if self._is_left_out:
            return
        try:
            self._calls.put_nowait(call)
        except Full:
            self._leave_out(f"it is {MOST_WAITING} calls behind")

    def _look(self) -> None:
        if self._error is not None:
            self._leave_out(f"{type(self._error).__name__}: {self._error}")

    def _leave_out(self, why: str) -> None:
        if not self._is_left_out:
            self._is_left_out = True
            self._tell(
                f"WARNING: {self._name} shows no more of this run, which goes on without it: "
                f"{why}. metrics.jsonl has everything."
            )

    def _work(self) -> None:
        while (call := self._calls.get()) is not None and not self._is_left_out:
            try:
                call()
            except Exception as error:  # of any library: none of them is worth the run
                with suppress(Exception):
                    self._sink.close(is_complete=False)
                self._error = error
                return
