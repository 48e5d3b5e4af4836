"""A sink on a thread of its own, whose faults cost the run neither time nor its life.

It is opened there too. Whatever goes wrong (network gone, disk full, a service that hangs) is told
once, and the sink is left out from then on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Thread

from megatron_eopd.errors import ConfigError
from megatron_eopd.metrics.sinks.sink import Options, Sink
from megatron_eopd.records import Histogram

MOST_WAITING = 256
"""Calls; a sink that is further behind is given up."""
OPEN_S = 60.0
"""Less than ranks wait for each other: those of a run that begins wait for this."""
BROKEN_OFF_S = 10.0
"""To close all sinks. A run that was told to stop has 25 to 30 s in all, one with an error 15."""
COMPLETE_S = 120.0
"""The same of a complete run: the last of it may have to be sent."""

_FAULTS = (Exception, SystemExit)
"""Of any library: none of them is worth the run."""


class Background:
    """A Sink. All calls but `close` return at once; the thread makes them in their order."""

    def __init__(
        self, name: str, make: Callable[[], Sink], tell: Callable[[str], None], advice: str = ""
    ) -> None:
        """`tell`: called with a warning, on the caller's own thread. `advice`: a sentence for who
        cannot open it."""
        self._name, self._make, self._tell, self._advice = name, make, tell, advice
        self._calls: SimpleQueue[Callable[[Sink], None]] = SimpleQueue()
        self._open_s, self._open_by = OPEN_S, time.monotonic() + OPEN_S
        self._is_open = Event()  # or cannot be opened
        self._fault = ""
        self._is_left_out = False
        self._is_closed = False
        self._thread = Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def wait_until_open(self) -> None:
        """
        Raises:
            ConfigError: it cannot be opened, or not in time.
        """
        self._is_open.wait(max(self._open_by - time.monotonic(), 0))
        fault = self._find_fault()
        if fault:
            self._is_left_out = True
            raise ConfigError(
                f"logging.trackers names {self._name}, and {fault} Or take {self._name} out of the "
                f"list."
            )

    def about(self, options: Options) -> None:
        self._later(lambda sink: sink.about(options))

    def write(
        self, iteration: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
    ) -> None:
        self._later(lambda sink: sink.write(iteration, scalars, histograms))

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._later(lambda sink: sink.text(iteration, name, markdown))

    def close(self, *, is_complete: bool) -> None:
        """Waits, but not for ever."""
        close_all([self], is_complete=is_complete)

    def begin_to_close(self, *, is_complete: bool) -> None:
        def close(sink: Sink) -> None:
            self._is_closed = True
            sink.close(is_complete=is_complete)

        self._calls.put(close)

    def wait_until_closed(self, deadline: float, wait_s: float) -> None:
        """`deadline`: by time.monotonic(); `wait_s`: how long that was, all in all."""
        self._look()
        if not self._is_left_out:
            self.join(max(deadline - time.monotonic(), 0))
            self._look()
            if self._thread.is_alive():
                self._leave_out(f"it has not finished within {wait_s:g} s.")

    def join(self, timeout_s: float) -> None:
        """Until it has closed, by itself or because it was told to."""
        self._thread.join(timeout_s)

    def _later(self, call: Callable[[Sink], None]) -> None:
        self._look()
        if self._is_left_out:
            return
        if self._calls.qsize() < MOST_WAITING:
            self._calls.put(call)
        else:
            self._leave_out(f"it is {MOST_WAITING} calls behind.")

    def _look(self) -> None:
        if fault := self._find_fault():
            self._leave_out(fault)

    def _find_fault(self) -> str:
        if not self._fault and not self._is_open.is_set() and time.monotonic() >= self._open_by:
            return f"it is not open after {self._open_s:g} s. {self._advice}".rstrip()
        return self._fault

    def _leave_out(self, why: str) -> None:
        if not self._is_left_out:
            self._is_left_out = True
            self._tell(
                f"WARNING: {self._name} shows no more of this run, which goes on without it: "
                f"{why} metrics.jsonl has everything."
            )

    def _work(self) -> None:
        try:
            sink = self._make()
        except _FAULTS as error:
            self._fault = f"it cannot be opened: {error}. {self._advice}".rstrip()
            return
        finally:
            self._is_open.set()
        try:
            while not (self._is_left_out or self._is_closed):
                self._calls.get()(sink)
        except _FAULTS as error:
            self._fault = f"{type(error).__name__}: {error}."
        if not self._is_closed:
            with suppress(*_FAULTS):
                sink.close(is_complete=False)


def close_all(shown: Sequence[Background], *, is_complete: bool) -> None:
    """At once, with one deadline for all."""
    wait_s = COMPLETE_S if is_complete else BROKEN_OFF_S
    deadline = time.monotonic() + wait_s
    for sink in shown:
        sink.begin_to_close(is_complete=is_complete)
    for sink in shown:
        sink.wait_until_closed(deadline, wait_s)
