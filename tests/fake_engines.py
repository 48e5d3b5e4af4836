"""Engines in this process that answer Orders at once, and fail where a test wants it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_eopd.config import RolloutConfig
from megatron_eopd.rollout.fleet import Fleet
from megatron_eopd.rollout.handle import EngineHandle
from megatron_eopd.rollout.messages import (
    Heartbeat,
    Orders,
    Reply,
    Report,
    Request,
    Sample,
    SampleRequest,
)
from megatron_eopd.rollout.placement import Seat
from megatron_eopd.rollout.states import Life
from megatron_eopd.rollout.weights import WeightLoading
from megatron_eopd.weight_sync.manifest import Manifest

MANIFEST = Manifest(((),))
LAST_LINES = "Last lines of engine.txt:\n  a line of its log"


class Died(Exception):
    """The process ends here."""


@dataclass
class FakeEngine:
    """A Link, its relay and the process behind it. Faults are those of its first `faulty_lives`
    lives; samples are counted from the beginning of a life."""

    faulty_lives: int = 1
    die_at: int | None = None
    """It dies instead of giving this sample."""
    hold_at: int | None = None
    """It is silent instead of giving this sample, …"""
    hold_s: float = 1e9
    """… for so long."""
    lose_at: int | None = None
    """It forgets this and all other samples that it owes."""
    answers_twice: bool = False
    errors: dict[str, str] = field(default_factory=dict)
    """By verb, what it answers instead of a value."""
    dies_of: Sequence[str] = ()
    """Verbs."""
    dies_after: Sequence[str] = ()
    """Verbs; it answers them first."""
    ignores: Sequence[str] = ()
    """Verbs that it never answers."""
    busy_for: dict[str, int] = field(default_factory=dict)
    """By verb, after how many exchanges it answers."""
    pace_s: float = 0.0
    """At least, between two samples."""
    values: dict[str, object] = field(default_factory=dict)
    """By verb, what it answers."""

    lives: int = 0
    heard: list[Request] = field(default_factory=list)
    """In all of its lives."""
    kills: int = 0
    rests: int = 0
    version: int | None = None

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.lives += 1
        self.is_faulty = self.lives <= self.faulty_lives
        self.alive, self.version, self._given, self._adding = True, None, 0, 0
        self._inbox: list[Request] = [Request(0, "start")]
        self._owed: list[SampleRequest] = []
        self._held_until = self._last_sample = 0.0
        self._exchanges_left: int | None = None

    def tell(self, orders: Orders) -> None:
        self._orders = orders
        self.rests += orders.rest

    def flush(self) -> None: ...

    def hear(self) -> Report:
        time.sleep(0.0005)
        orders = self._orders
        if orders.kill and self.alive:
            self.alive, self.kills = False, self.kills + 1
        if orders.start:
            self._begin()
            return Report()
        if not self.alive:
            return Report(death="killed by SIGKILL.")
        self.heard += orders.requests
        self._inbox += orders.requests
        replies: list[Reply] = []
        try:
            for reply in self._run():
                replies.append(reply)
        except Died:
            self.alive = False
            return Report(tuple(replies), death=f"killed by SIGSEGV.\n{LAST_LINES}")
        return Report(tuple(replies), last_line="loading")

    def _run(self) -> Iterator[Reply]:
        if time.monotonic() < self._held_until:
            return
        if self._exchanges_left is not None:
            self._exchanges_left -= 1
            if not self._exchanges_left:
                raise Died
        inbox, self._inbox = self._inbox, []
        for request in inbox:
            if self.is_faulty and self.busy_for.get(request.verb, 0) > 0:
                self.busy_for[request.verb] -= 1
                self._inbox.append(request)
                return
            yield from self._answer(request)
        while self._owed and time.monotonic() - self._last_sample >= self.pace_s:
            self._last_sample = time.monotonic()
            if self.is_faulty and self._given == self.die_at:
                raise Died
            if self.is_faulty and self._given == self.hold_at:
                self._held_until, self.hold_at = time.monotonic() + self.hold_s, None
                return
            if self.is_faulty and self._given == self.lose_at:
                self._owed.clear()
            else:
                yield from self._sample(self._owed.pop(0))
            if not self._owed:
                yield Reply(self._adding, Heartbeat(0, 0), is_part=True)

    def _sample(self, request: SampleRequest) -> Iterator[Reply]:
        self._given += 1
        sample = Sample(request.number, [request.seed], [0.0], "stop", [str(self.version)])
        for _ in range(2 if self.answers_twice else 1):
            yield Reply(self._adding, sample, is_part=True)

    def _answer(self, request: Request) -> Iterator[Reply]:
        verb = request.verb
        if self.is_faulty and verb in self.dies_of:
            raise Died
        if self.is_faulty and verb in self.dies_after:
            self._exchanges_left = 3
        if self.is_faulty and verb in self.ignores:
            return
        if self.is_faulty and verb in self.errors:
            yield Reply(request.number, error=self.errors[verb])
            return
        if verb == "add":
            assert self.version is not None, "it was asked for samples without weights"
            self._owed += request.arguments["requests"]
            self._adding = request.number
        elif verb == "commit":
            self.version = request.arguments["version"]
        elif verb == "sleep":
            self.version = None
        default = 0.5 if verb == "load" else None
        yield Reply(request.number, self.values.get(verb, default))

    @property
    def added(self) -> list[SampleRequest]:
        return [
            r
            for request in self.heard
            if request.verb == "add"
            for r in request.arguments["requests"]
        ]


def fleet_of(*engines: FakeEngine, **options) -> tuple[Fleet, list[str]]:
    """And what it tells."""
    rollout = RolloutConfig(**{"max_num_seqs": 4, "engine_timeout_s": 30.0} | options)
    handles = [
        EngineHandle(Seat(n, (n,), 0), Life(n, rollout.max_restarts), engine)
        for n, engine in enumerate(engines)
    ]
    told: list[str] = []
    return Fleet(handles, [], MANIFEST, rollout, told.append), told


def wait_until_ready(fleet: Fleet) -> None:
    """Those that start have started."""
    while any(handle.life.state == "restarting" for handle in fleet.handles):
        fleet.exchange()


def sync(fleet: Fleet, version: int = 1, timeout_s: float = 30.0) -> bool:
    """Whether any engine holds it then."""
    loading = WeightLoading(fleet, MANIFEST, timeout_s)
    loading.begin()
    loading.post([(0, {0: [{} for _ in fleet.handles]})])
    if loading.finish() is None or not loading.commit(version):
        return False
    loading.serve()
    return True
