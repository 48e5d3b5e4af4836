"""When a run stops before its end. In: signals, a job's limit, the pace so far. Out: Interrupted.

The loop asks at every point where it can stop without losing anything. The ranks agree there by one
small all-reduce, so that all of them go on or all of them raise: what is left is finished where it
fits the time that is left, and saved where it does not.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_eopd.errors import Interrupted
from megatron_eopd.parallel.collectives import naming_stage
from megatron_eopd.run_log import RunLog
from megatron_eopd.stop_signals import STOPPING, StopSignals

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
END = "end"
LIMIT = "checkpoint.exit_duration_minutes"
REASONS = [*(number.name for number in STOPPING), LIMIT]
SLACK = 1.25
"""No two iterations take the same time."""


def fits(left_s: float, rest_s: float | None, save_s: float | None) -> bool:
    """Whether `rest_s` and a save behind it can be done in `left_s`. What was never measured does
    not fit."""
    if rest_s is None or save_s is None:
        return False
    return SLACK * (rest_s + save_s) <= left_s


class Interruption:
    def __init__(
        self,
        signals: StopSignals,
        log: RunLog,
        group: dist.ProcessGroup,
        limit: float | None = None,
    ) -> None:
        """`group`: gloo, all ranks of the student. `limit`: when the job ends, by time.monotonic();
        one rank that has it is enough."""
        self._signals, self._log, self._group, self._limit = signals, log, group, limit
        self._save_s: float | None = None
        self._passed: dict[str, float] = {}  # when the points of this iteration were
        self._before: dict[str, float] = {}  # those of the last whole one
        self._lasted: dict[str, float] = {}  # of the waits, what each took last
        self._wait: tuple[str, float] | None = None

    def begin_work(self) -> None:
        """From now on there is something to lose."""
        self._signals.keeps_work = True

    def pause(self, point: str, until: str = END, *, is_boundary: bool = False) -> None:
        """A point where the run can stop, the work until the point `until` before it. At a boundary
        nothing is begun. Collective.

        Raises:
            Interrupted: on every rank.
        """
        self._passed[point] = time.monotonic()
        rest_s = self._between(point, until)
        self._agree(self._signal_wants(rest_s, is_boundary) or self._limit_wants(rest_s))

    def end_iteration(self, save_s: float | None) -> None:
        """`save_s`: how long the last save took; None where it is not known."""
        if save_s is not None:
            self._save_s = save_s
        self._before = self._passed | {END: time.monotonic()}
        self._passed = {}

    def must_leave(self) -> str | None:
        """For what this rank must break off the wait that it is in, by its own clock."""
        if self._wait is None:
            return None
        name, began = self._wait
        last_s = self._lasted.get(name)
        rest_s = None if last_s is None else began + last_s - time.monotonic()
        return self._signal_wants(rest_s, False) or self._limit_wants(rest_s)

    def pause_in_wait(self) -> None:
        """A safe point within a wait. Collective.

        Raises:
            Interrupted: on every rank.
        """
        if self._wait is not None:
            self._agree(self.must_leave())

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """While something is done that may be broken off, and begun again by the resumed run."""
        self._wait = (name, time.monotonic())
        try:
            yield
            self._lasted[name] = time.monotonic() - self._wait[1]
        finally:
            self._wait = None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While what happens must not be ended by the grace time."""
        before, self._signals.is_saving = self._signals.is_saving, True
        try:
            yield
        finally:
            self._signals.is_saving = before

    def _agree(self, reason: str | None) -> None:
        told = torch.tensor([0 if reason is None else 1 + REASONS.index(reason)])
        with naming_stage(self._log.stage):
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        if told.item():
            raise Interrupted(f"stopped in {self._log.stage} by {REASONS[told.item() - 1]}")

    def _between(self, point: str, until: str) -> float | None:
        """Seconds, in the last whole iteration."""
        if point not in self._before or until not in self._before:
            return None
        return self._before[until] - self._before[point]

    def _signal_wants(self, rest_s: float | None, is_boundary: bool) -> str | None:
        left_s = self._signals.deadline - time.monotonic()
        is_over = is_boundary or not fits(left_s, rest_s, self._save_s)
        return self._signals.noted if is_over else None

    def _limit_wants(self, rest_s: float | None) -> str | None:
        """Nothing is stopped for a limit because its pace is not known."""
        if self._limit is None:
            return None
        left_s = self._limit - time.monotonic()
        return None if fits(left_s, rest_s or 0.0, self._save_s or 0.0) else LIMIT
