"""Signals that ask this process to stop. The first is noted, a second one ends the process at once.

Python runs its handlers between two instructions of the main thread, which may be in a collective
for minutes. So a thread hears the signals, and also ends a process that is stuck when the grace
time is over.
"""

import os
import signal
import socket
import threading
import time
from types import FrameType

from megatron_eopd.errors import tell_torchrun
from megatron_eopd.run_log import RunLog

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_S = 2.0
"""A scheduler signals torchrun and its ranks, and torchrun its ranks again: within this time both
are one signal."""
POLL_S = 0.2


class StopSignals:
    """Of this process, from its creation on the main thread until `ignore`."""

    def __init__(self, log: RunLog, grace_s: float) -> None:
        self.noted: str | None = None
        """The first one's name."""
        self.deadline: float = float("inf")
        """Until when it can be acted on, by time.monotonic()."""
        self.keeps_work: bool = False
        """Whether the first signal waits for a safe point; before, nothing is there to be lost."""
        self.is_saving: bool = False
        """What is late then is not ended: it is up to others."""
        self._log = log
        self._grace_s = grace_s
        self._first_at = 0.0
        self._told_late = False
        self._heard, ours = socket.socketpair()
        self._heard.settimeout(POLL_S)
        ours.setblocking(False)
        self._ours = ours  # the number alone does not keep it open
        self._handled = [number for number in STOPPING if _is_free(number)]
        for number in self._handled:
            signal.signal(number, _leave_it_to_the_thread)
        signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        # torchrun signals all of a rank's group: what a rank forks must not hand that on to it.
        os.register_at_fork(after_in_child=self._ignore)
        self._done = threading.Event()
        threading.Thread(target=self._hear, name="signals", daemon=True).start()

    def ignore(self) -> None:
        """From now on: the process leaves by itself."""
        self._done.set()
        self._ignore()

    def _ignore(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in self._handled:
            signal.signal(number, signal.SIG_IGN)

    def _hear(self) -> None:
        while not self._done.is_set():
            try:
                (number,) = self._heard.recv(1)
            except TimeoutError:
                self._look_at_the_clock()
            else:
                if number in self._handled and not self._done.is_set():
                    self._take(signal.Signals(number))

    def _take(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if self.noted is None:
            self._first_at, self.deadline = now, now + self._grace_s
            self.noted = received.name
            if not self.keeps_work:
                self._end(
                    f"stopped by {received.name} in {self._log.stage}: another rank failed first, "
                    f"or somebody ended the job. There was nothing to save.",
                    1,
                )
            self._log.line(
                f"{received.name}: stopping; what fits into {self._grace_s:g} s is finished, and "
                f"saved; a second signal ends the run at once"
            )
        elif now - self._first_at > SAME_S:
            self._end(
                f"{received.name} in {self._log.stage}: the second signal, which ends the run at "
                f"once. It goes on from its newest checkpoint.",
                128 + received,
            )

    def _look_at_the_clock(self) -> None:
        if time.monotonic() < self.deadline or self._told_late:
            return
        self._told_late = True
        late = f"{self._grace_s:g} s (checkpoint.exit_grace_seconds) after {self.noted}"
        if self.is_saving:
            self._log.line(f"WARNING: {late} the run still saves. It is not stopped in that.")
            return
        self._end(
            f"stopped by {self.noted} in {self._log.stage}, which was not done {late}: another "
            f"rank failed first, or this takes longer. It goes on from its newest checkpoint.",
            1,
        )

    def _end(self, text: str, code: int) -> None:
        """The main thread may be stuck, and cannot be asked."""
        if not self._done.is_set():
            tell_torchrun(f"error: {text}")
            self._log.error(f"error: {text}")
            self._log.close()
            os._exit(code)


def _is_free(number: signal.Signals) -> bool:
    """nohup has the hang-up ignored."""
    return number != signal.SIGHUP or signal.getsignal(number) is signal.SIG_DFL


def _leave_it_to_the_thread(_number: int, _frame: FrameType | None) -> None: ...
