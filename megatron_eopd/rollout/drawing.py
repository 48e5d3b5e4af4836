"""One call for samples, led by rank 0. In: requests in groups. Out: a sample for each, once.

Engines pull from one queue; seeds belong to requests. What an engine had when it died goes back,
and others answer it. When none is left that holds the weights, the call pauses for a weight sync.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_eopd.errors import EngineError
from megatron_eopd.records import RolloutProgress
from megatron_eopd.rollout.fleet import Fleet, MustLeave
from megatron_eopd.rollout.handle import EngineHandle
from megatron_eopd.rollout.messages import Heartbeat, Sample, SampleRequest
from megatron_eopd.rollout.request_queue import RequestQueue
from megatron_eopd.rollout.states import State

BACKLOG = 1.25
"""Requests that an engine has, for each that it runs at once: so that it never waits for more."""
WATCH_S = 1.0


@dataclass
class EngineUse:
    """What one engine did in a call."""

    tokens: int = 0
    busy_s: float = 0.0
    """With requests."""
    request_s: float = 0.0
    """Σ over its requests of the time that it had them."""


class Drawing:
    def __init__(
        self,
        fleet: Fleet,
        groups: Sequence[Sequence[SampleRequest]],
        take: Callable[[Sample], None],
        must_leave: MustLeave,
        watch: Callable[[RolloutProgress], None],
    ) -> None:
        """`take` hears of every sample, once. `must_leave`: why the wait cannot go on."""
        self._fleet, self._take = fleet, take
        self._must_leave, self._watch = must_leave, watch
        self._begin = self._last = time.monotonic()
        self._queue = RequestQueue(groups, int(BACKLOG * fleet.options.max_num_seqs))
        self._waited_s = self._paused_s = 0.0
        self._watched = self._begin
        self._last_add: dict[int, int] = {}  # by engine that has had requests of this call
        self.use = {h.number: EngineUse() for h in fleet.handles}

    @property
    def seconds(self) -> float:
        return self._last - self._begin

    @property
    def queue_wait_s(self) -> float:
        """How long a request waited for an engine, on average."""
        return self._waited_s / max(self._queue.total, 1)

    def go_on(self) -> bool:
        """Until all samples are there: True. False: no engine holds the weights any more.

        Raises:
            EngineError: too few engines are left, or the call takes too long.
            Interrupted: `must_leave` said so.
        """
        fleet = self._fleet
        paused_at = self._last
        self._count_use()  # of a pause, in which no engine has requests
        self._paused_s += self._last - paused_at
        try:
            while not self._queue.is_done:
                if not fleet.serving:
                    # Or those that were found lost just now would keep what they owe.
                    fleet.exchange(self._give_back)
                    return False
                self._deal()
                fleet.exchange(self._give_back)
                for handle in fleet.handles:
                    self._hear(handle)
                self._count_use()
                self._leave_in_time()
        except BaseException:
            # They would go on with what nobody waits for, and answer the next call with it.
            fleet.kill("its call was broken off")
            raise
        for handle in fleet.serving:
            handle.life.served()
        return True

    def _deal(self) -> None:
        healthy = [h.number for h in self._fleet.handles if h.life.state == State.HEALTHY]
        waited_s = time.monotonic() - self._begin
        for number, requests in self._queue.deal(healthy).items():
            handle = self._fleet.handles[number]
            if self._queue.in_flight(number) == len(requests):
                handle.heard = time.monotonic()  # until now it had nothing to say
            is_first = number not in self._last_add
            self._last_add[number] = handle.stream("add", requests=requests, is_first=is_first)
            self._waited_s += waited_s * len(requests)

    def _take_parts(self, handle: EngineHandle) -> None:
        for number, part in handle.parts():
            if isinstance(part, Sample):
                if self._queue.take_answer(handle.number, part.number):
                    self.use[handle.number].tokens += len(part.response_ids)
                    self._take(part)
            elif self._has_lost_some(handle, number, part):
                handle.failure = "it has ended, and owes samples"

    def _hear(self, handle: EngineHandle) -> None:
        self._take_parts(handle)
        if not handle.life.serves:
            return
        if handle.failure is not None:
            handle.life.failed_requests += 1
            handle.die(f"it failed while generating: {handle.failure}")
        elif self._queue.in_flight(handle.number):
            self._listen(handle)

    def _has_lost_some(self, handle: EngineHandle, number: int, beat: Heartbeat) -> bool:
        """Whether it has taken all requests, by the number of the last, and has none left, while
        not all are answered."""
        is_up_to_date = number == self._last_add.get(handle.number)
        return is_up_to_date and not beat.unfinished and self._queue.in_flight(handle.number) > 0

    def _listen(self, handle: EngineHandle) -> None:
        """Has it been silent for too long?"""
        limit_s = self._fleet.options.engine_timeout_s
        silent_s = time.monotonic() - handle.heard
        if silent_s > limit_s:
            handle.life.failed_requests += 1
            handle.die(
                f"it was silent for rollout.engine_timeout_s={limit_s:g} with "
                f"{self._queue.in_flight(handle.number)} requests to answer"
            )
        elif silent_s > limit_s / 2 and handle.life.state == State.HEALTHY:
            handle.life.silent()
            self._fleet.tell(f"WARNING: {handle.name} has been silent for {silent_s:.0f} s.")

    def _give_back(self, handle: EngineHandle) -> str:
        """What an engine that died had not answered."""
        self._take_parts(handle)  # what it answered before counts
        count = self._queue.give_back(handle.number)
        self._last_add.pop(handle.number, None)
        return f"Its {count} requests go back into the queue. " if count else ""

    def _count_use(self) -> None:
        now = time.monotonic()
        passed_s, self._last = now - self._last, now
        for number, use in self.use.items():
            in_flight = self._queue.in_flight(number)
            use.request_s += in_flight * passed_s
            use.busy_s += passed_s if in_flight else 0.0
        if now - self._watched > WATCH_S or self._queue.is_done:
            self._watched = now
            tokens = sum(use.tokens for use in self.use.values())
            serving = len(self._fleet.serving)
            self._watch(
                RolloutProgress(
                    self._queue.answered,
                    self._queue.total,
                    tokens,
                    self.seconds,
                    serving,
                    len(self.use),
                )
            )

    def _leave_in_time(self) -> None:
        self._fleet.leave_if_told(self._must_leave, "generating")
        limit_s = self._fleet.options.generate_timeout_s
        if self.seconds - self._paused_s > limit_s:  # starts and syncs have their own
            waiting = {h.name: self._queue.in_flight(h.number) for h in self._fleet.handles}
            raise EngineError(
                f"{self._queue.answered} of {self._queue.total} responses came within "
                f"rollout.generate_timeout_s={limit_s:g}; the engines were killed. Still with "
                f"them: {waiting}. Raise the time-out, or lower rollout.batch_size or "
                f"rollout.max_response_length."
            )
