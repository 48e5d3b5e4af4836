"""One engine as rank 0 sees it: its life, what was asked of it, and what it has answered."""

import time
from dataclasses import dataclass, field
from typing import Any

from megatron_eopd.rollout.messages import Orders, Reply, Report, Request
from megatron_eopd.rollout.placement import Seat
from megatron_eopd.rollout.relay import START, Link
from megatron_eopd.rollout.states import Life, State


@dataclass
class EngineHandle:
    seat: Seat
    life: Life
    link: Link
    started: float = field(default_factory=time.monotonic)
    """When its process was started, by time.monotonic()."""
    heard: float = field(default_factory=time.monotonic)
    """When it last spoke."""
    last_line: str = ""
    """Of its log, while it starts."""
    failure: str | None = None
    """Why what it streams has ended early."""
    _parts: list[tuple[int, Any]] = field(default_factory=list)
    _posts: list[Request] = field(default_factory=list)
    _open: set[int] = field(default_factory=lambda: {START})
    """Numbers of requests that have no answer yet."""
    _streams: set[int] = field(default_factory=set)
    _answers: dict[int, Reply] = field(default_factory=dict)
    _number: int = START
    _starts: bool = False
    is_buried: bool = False
    """Whether its last death was told."""

    @property
    def number(self) -> int:
        return self.seat.number

    @property
    def name(self) -> str:
        return f"engine {self.number} on rank {self.seat.owner}"

    def post(self, verb: str, **arguments: Any) -> int:
        """Ask it, at the next exchange; the answer comes under the number returned."""
        self._number += 1
        self._posts.append(Request(self._number, verb, arguments))
        self._open.add(self._number)
        return self._number

    def parts(self) -> list[tuple[int, Any]]:
        """Parts of answers, once each: the number of the request they belong to, and what came."""
        parts, self._parts = self._parts, []
        return parts

    def answer(self, number: int) -> Reply | None:
        """The last reply to a request, once, if it has come."""
        return self._answers.pop(number, None)

    def stream(self, verb: str, **arguments: Any) -> int:
        """As `post`, of what answers in parts and has no end; see `parts` and `failure`."""
        number = self.post(verb, **arguments)
        self._open.remove(number)
        self._streams.add(number)
        return number

    def awaits(self, number: int) -> bool:
        """Whether an answer may still come."""
        return number in self._open

    def tell(self) -> None:
        """The first half of an exchange."""
        is_dead = self.life.state == State.DEAD
        requests, self._posts = tuple(self._posts), []
        self.link.tell(Orders(start=self._starts, kill=is_dead, requests=requests))
        self._starts = False

    def hear(self) -> None:
        """The second half."""
        self.take(self.link.hear())

    def take(self, report: Report) -> None:
        if self.life.state == State.DEAD:
            return  # what comes now was meant for somebody who no longer waits
        if report.replies:
            self.heard = time.monotonic()
            if self.life.state == State.SUSPECT:
                self.life.spoke()
        for reply in report.replies:
            if reply.is_part:
                self._parts.append((reply.number, reply.value))
            elif reply.number in self._streams:
                self.failure = self.failure or reply.error
            elif reply.number in self._open:
                self._open.remove(reply.number)
                self._answers[reply.number] = reply
        self.last_line = report.last_line or self.last_line
        if report.death is not None:
            self.die(report.death)

    def die(self, reason: str) -> None:
        """Its process has ended, or is killed with the next exchange. What it has answered stays
        to be taken."""
        self.life.died(reason)
        self._posts, self._open, self.is_buried = [], set(), False

    def restart(self) -> None:
        """With the next exchange."""
        self.life.restarted()
        self._starts, self._open, self.started = True, {START}, time.monotonic()
        self._answers, self._parts, self._streams, self.failure = {}, [], set(), None
        self.heard = self.started
