"""All engines, led by rank 0. In: what they are asked. Out: what they answer.

Nothing here waits without a deadline, and no engine's end is an error by itself: it is told, the
engine is started again in the background with dummy weights, and it serves again after the next
weight sync. The run ends when fewer than rollout.min_engines are left.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from megatron_eopd.config import RolloutConfig
from megatron_eopd.errors import EngineError, Interrupted, LostRankError
from megatron_eopd.parallel.farewell import Farewell
from megatron_eopd.rollout.handle import EngineHandle
from megatron_eopd.rollout.messages import Orders, Reply
from megatron_eopd.rollout.relay import START, Link
from megatron_eopd.rollout.states import State
from megatron_eopd.weight_sync.manifest import Manifest

TELL_INTERVAL_S = 5.0
MEET_TIMEOUT_S = 60.0
MustLeave = Callable[[], str | None]
"""Says why a wait cannot go on; None while it can."""


def never() -> None:
    return None


class Fleet:
    def __init__(
        self,
        handles: Sequence[EngineHandle],
        others: Sequence[Link],
        manifest: Manifest,
        options: RolloutConfig,
        tell: Callable[[str], None],
    ) -> None:
        """`handles` by the engines' numbers. `others`: to ranks that own no engine and wait for the
        end of the run all the same. `tell` hears what happens to engines."""
        self.handles, self.options, self.tell = handles, options, tell
        self._others = others
        first_of_node = {h.seat.node: h for h in reversed(handles)}
        is_separate = options.placement == "separate"
        self.forwarders = list(first_of_node.values()) if is_separate else []
        """Engines whose owners, not of the student's ranks, hand on what comes to their host."""
        self._init_info = {"manifest": manifest.to_json(), "digest": manifest.digest}
        self._meetings: dict[int, int] = {}  # by engine, the number of its request to meet

    @property
    def serving(self) -> list[EngineHandle]:
        return [h for h in self.handles if h.life.serves]

    @property
    def restarting(self) -> list[EngineHandle]:
        """Those that load, the first start included."""
        return [h for h in self.handles if h.life.state == State.RESTARTING]

    def exchange(self, when_one_dies: Callable[[EngineHandle], str] = lambda handle: "") -> None:
        """Tell every engine what it is asked, hear what it says, welcome those that have started,
        and start those that died again. `when_one_dies` says what becomes of its work.

        Raises:
            EngineError: one cannot be started at all, or too few are left.
        """
        for handle in self.handles:
            handle.tell()
        for handle in self.handles:
            handle.hear()
        for handle in self.restarting:
            self._welcome(handle)
        for handle in self.handles:
            if handle.life.state == State.DEAD and not handle.is_buried:
                self._bury(handle, when_one_dies(handle))
                handle.tell()  # it starts at once: this exchange may be the last for long
                handle.hear()

    def ask(
        self, handles: Sequence[EngineHandle], verb: str, wait_s: float, doing: str, **what: Any
    ) -> dict[int, Any]:
        """The answers of those that gave a sound one, by engine. Who is late is killed.

        Raises:
            EngineError: all that live have failed: then it is not an engine's own fault.
        """
        running = [h for h in handles if h.life.runs]
        return self.answers({h.number: h.post(verb, **what) for h in running}, wait_s, doing)

    def answers(self, numbers: Mapping[int, int], wait_s: float, doing: str) -> dict[int, Any]:
        """As `ask`, of requests that were posted: by engine, their numbers."""
        replies = self._replies(numbers, wait_s, doing)
        failed = {n: reply.error for n, reply in replies.items() if reply.error is not None}
        if failed and len(failed) == len(replies):
            raise EngineError(
                "\n".join(
                    f"{self.handles[n].name} failed while {doing}: {failed[n]}" for n in failed
                )
            )
        for number, error in failed.items():
            self.handles[number].die(f"it failed while {doing}, and others did not: {error}")
        if failed:
            self.exchange()
        return {n: reply.value for n, reply in replies.items() if n not in failed}

    def wait_for_start(self, must_leave: MustLeave = never) -> None:
        """Until every engine is there, or until one is while the others start again.

        Raises:
            EngineError: one cannot be started at all, or too few are left.
            Interrupted: `must_leave` said so.
        """
        told = time.monotonic()
        self.exchange()
        while not any(h.life.runs for h in self.handles) or any(
            not h.life.restarts for h in self.restarting
        ):
            if time.monotonic() - told > TELL_INTERVAL_S:
                told = time.monotonic()
                for handle in self.restarting:
                    line = handle.last_line or "nothing in its log yet"
                    self.tell(f"{handle.name} starts, {told - handle.started:.0f} s: {line}")
            self.leave_if_told(must_leave, "starting")
            self.exchange()

    def leave_if_told(self, must_leave: MustLeave, doing: str) -> None:
        """
        Raises:
            Interrupted: the wait cannot go on; all engines are gone then.
        """
        if (reason := must_leave()) is not None:
            self.kill("the run was stopped")
            raise Interrupted(f"stopped by {reason} while vLLM was {doing}")

    def sleep(self, *, on_same_devices: bool) -> None:
        """Have those that run let go of weights and cache. Where the student needs their devices,
        those that start again are waited for: they would take memory while it trains."""
        while True:
            while on_same_devices and self.restarting:
                self.exchange()
            self.ask(self.handles, "sleep", MEET_TIMEOUT_S, "going to sleep")
            if not (on_same_devices and self.restarting):
                break
        for handle in self.serving:
            handle.life.falls_behind()

    def kill(self, reason: str) -> None:
        """All processes, at once."""
        for handle in self.handles:
            if handle.life.state != State.DEAD:
                handle.die(reason)
        for step in (EngineHandle.tell, EngineHandle.hear):
            for handle in self.handles:
                with suppress(LostRankError):  # its engine goes with the rank
                    step(handle)

    def rest(self) -> None:
        """Let the student's ranks that own engines go back to what all ranks do."""
        for handle in self.handles:
            with suppress(LostRankError):  # what was to be told of it is on its way
                handle.link.tell(Orders(rest=True))

    def end(self, farewell: Farewell) -> None:
        """Let the ranks go on which engines alone sit; the student's know by themselves."""
        if self.options.placement != "separate":
            return
        links = [*(h.link for h in self.handles), *self._others]
        for link in links:
            with suppress(LostRankError):
                link.tell(Orders(end=farewell))
        for link in links:
            with suppress(LostRankError):
                link.flush()

    def _welcome(self, handle: EngineHandle) -> None:
        """One whose process has loaded hears which tensors will come, and is ready for them."""
        if handle.answer(START) is not None:
            handle.started = time.monotonic()  # rank 0 may have been away when it was ready
            self._meetings[handle.number] = handle.post(
                "meet", init_info=self._init_info, timeout_s=MEET_TIMEOUT_S
            )
        met = handle.answer(self._meetings.get(handle.number, -1))
        if met is not None and met.error is None:
            handle.life.ready()
        elif met is not None:
            handle.die(f"it failed to hear of the weights: {met.error}")
        elif time.monotonic() - handle.started > self._start_limit_s(handle):
            handle.die(
                f"it was not ready within rollout.start_timeout_s="
                f"{self.options.start_timeout_s:g}: {handle.last_line}"
            )

    def _start_limit_s(self, handle: EngineHandle) -> float:
        limit_s = self.options.start_timeout_s
        return limit_s if handle.awaits(START) else min(limit_s, MEET_TIMEOUT_S)

    def _bury(self, handle: EngineHandle, consequence: str) -> None:
        life, handle.is_buried = handle.life, True
        if life.is_unproven:
            raise EngineError(f"{handle.name} cannot be started: {life.reason}")
        if life.is_lost:
            then = f"It is not started again, by rollout.max_restarts={life.max_restarts}"
        else:
            handle.restart()
            then = (
                f"It starts again, {life.restarts_in_a_row} of {life.max_restarts} times in a row"
            )
        self.tell(f"WARNING: {handle.name} died: {life.reason}\n{consequence}{then}.")
        left = [h for h in self.handles if not h.life.is_lost]
        if len(left) < self.options.min_engines:
            raise EngineError(self._too_few(len(left)))

    def _replies(self, numbers: Mapping[int, int], wait_s: float, doing: str) -> dict[int, Reply]:
        """Of those that lived to give one."""
        deadline = time.monotonic() + wait_s
        waiting, replies = dict(numbers), {}
        while waiting:
            self.exchange(lambda handle: f"That was while {doing}. ")
            is_late = time.monotonic() > deadline
            for engine, number in list(waiting.items()):
                handle = self.handles[engine]
                reply = handle.answer(number)
                if reply is not None:
                    replies[engine] = reply
                elif handle.awaits(number) and is_late:
                    handle.die(f"it gave no answer within {wait_s:g} s while {doing}")
                elif handle.awaits(number):
                    continue
                del waiting[engine]
            if is_late:
                self.exchange()  # who was late is killed with it
            # What a process has answered says nothing of the one that was started in its place.
            replies = {n: reply for n, reply in replies.items() if self.handles[n].life.runs}
        return replies

    def _too_few(self, left: int) -> str:
        lost = "\n".join(f"{h.name}: {h.life.reason}" for h in self.handles if h.life.is_lost)
        return (
            f"{left} of {len(self.handles)} vLLM engines are left, and rollout.min_engines="
            f"{self.options.min_engines}. The others died more than rollout.max_restarts="
            f"{self.options.max_restarts} times without an iteration's rollouts in between:\n{lost}"
        )
