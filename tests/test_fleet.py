"""Engines as rank 0 leads them, some of which die, hang, lose requests or cannot start. No process
is started: they are tests.fake_engines."""

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from megatron_eopd.config import WeightSyncConfig
from megatron_eopd.errors import EngineError, Interrupted, LostRankError
from megatron_eopd.parallel.farewell import Farewell
from megatron_eopd.parallel.wire import JointWire
from megatron_eopd.records import RolloutProgress
from megatron_eopd.rollout import fleet as fleet_module
from megatron_eopd.rollout.drawing import Drawing
from megatron_eopd.rollout.fleet import Fleet
from megatron_eopd.rollout.messages import (
    Orders,
    Reply,
    Report,
    Request,
    Sample,
    SampleRequest,
)
from megatron_eopd.rollout.relay import Relay, WireLink, serve
from megatron_eopd.rollout.weights import WeightLoading
from megatron_eopd.weight_sync.verify import SyncCheck
from tests.fake_engines import MANIFEST, FakeEngine, fleet_of, sync, wait_until_ready

CPU = torch.device("cpu")


def groups_of(count: int, size: int = 1) -> list[list[SampleRequest]]:
    return [
        [
            SampleRequest(n, group, [1] * (1 + group % 5), 1000 + n, 1.0, 1.0, 8, [])
            for n in range(group * size, (group + 1) * size)
        ]
        for group in range(count)
    ]


def states_of(fleet: Fleet) -> list[str]:
    return [handle.life.state.value for handle in fleet.handles]


class Call:
    """One call for samples, and what came of it."""

    def __init__(
        self,
        fleet: Fleet,
        groups: list[list[SampleRequest]],
        take: Callable[[Sample], None] = lambda sample: None,
        must_leave: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.samples: list[Sample] = []
        self.progress: list[RolloutProgress] = []
        self.syncs = 0
        self.fleet, self.requests = fleet, [r for group in groups for r in group]
        self.drawing = Drawing(
            fleet,
            groups,
            lambda sample: (self.samples.append(sample), take(sample)),
            must_leave,
            self.progress.append,
        )

    def finish(self) -> "Call":
        while not self.drawing.go_on():
            assert not self.fleet.serving
            self.syncs += 1
            while not sync(self.fleet):
                pass
        expected = {r.number: [r.seed] for r in self.requests}
        assert {s.number: s.response_ids for s in self.samples} == expected, "each by its seed"
        assert len(self.samples) == len(expected), "and none twice"
        return self


def drawn(*engines: FakeEngine, count: int = 24, size: int = 1, **options):
    """The fleet after a call that all its samples came of, the call, and what was told."""
    fleet, told = fleet_of(*engines, **options)
    assert sync(fleet)
    call = Call(fleet, groups_of(count, size)).finish()
    return fleet, call, told


def test_sound_engines_share_a_call():
    """Each has some of it, at most a quarter more than it runs at once, groups whole; the first
    requests of a call on an engine say so."""
    engines = [FakeEngine(pace_s=0.001) for _ in range(3)]
    fleet, call, told = drawn(*engines, count=20, size=2)
    assert told == [] and call.syncs == 0 and states_of(fleet) == ["healthy"] * 3
    for engine in engines:
        adds = [r.arguments for r in engine.heard if r.verb == "add"]
        assert [add["is_first"] for add in adds] == [True] + [False] * (len(adds) - 1)
        assert adds and set(Counter(r.group for r in engine.added).values()) == {2}
        assert len(adds[0]["requests"]) == 4
    assert call.progress[-1].answered == call.progress[-1].total == 40
    assert sum(use.tokens for use in call.drawing.use.values()) == 40
    assert all(0 < use.busy_s <= call.drawing.seconds for use in call.drawing.use.values())


def test_a_second_call_starts_anew():
    fleet, _, _ = drawn(FakeEngine(), FakeEngine())
    Call(fleet, groups_of(5)).finish()
    for handle in fleet.handles:
        adds = [r.arguments for r in handle.link.heard if r.verb == "add"]
        assert sum(add["is_first"] for add in adds) == 2


FAULTS = {
    "dies before its first": ({"die_at": 0}, "killed by SIGSEGV"),
    "dies later": ({"die_at": 5}, "killed by SIGSEGV"),
    "loses what it owes": ({"lose_at": 2}, "it has ended, and owes samples"),
    "refuses requests": ({"errors": {"add": "RuntimeError: no room"}}, "RuntimeError: no room"),
    "dies of requests": ({"dies_of": ["add"]}, "killed by SIGSEGV"),
    "hangs": ({"hold_at": 3}, "it was silent for rollout.engine_timeout_s=0.3 with"),
}
faults = pytest.mark.parametrize("fault,reason", FAULTS.values(), ids=FAULTS.keys())


@faults
def test_what_a_lost_engine_owes_others_answer_with_the_same_seeds(fault, reason):
    """The call goes on without it; it starts again beside it, and serves after the next sync."""
    engine = FakeEngine(**fault)
    fleet, call, told = drawn(engine, FakeEngine(pace_s=0.001), engine_timeout_s=0.3)
    assert call.syncs == 0 and states_of(fleet)[1] == "healthy"
    assert not fleet.handles[0].life.serves, "it does not hold the weights"
    (warning,) = (line for line in told if "died" in line)
    assert warning.startswith("WARNING: engine 0 on rank 0 died: ") and reason in warning
    assert "requests go back into the queue. It starts again, 1 of 3 times" in warning
    assert engine.lives == 2
    wait_until_ready(fleet)
    assert sync(fleet, 2) and states_of(fleet) == ["healthy"] * 2
    Call(fleet, groups_of(30)).finish()
    assert {s.version for s in (engine, fleet.handles[1].link)} == {2}
    assert fleet.handles[0].life.restarts == 1 and fleet.handles[0].life.restarts_in_a_row == 0


@faults
def test_when_all_are_lost_the_call_pauses_for_a_weight_sync(fault, reason):
    """What was answered before is not drawn again, and what was not is dealt out at once."""
    engines = [FakeEngine(**fault), FakeEngine(**fault)]
    fleet, call, told = drawn(*engines, engine_timeout_s=0.3)
    assert call.syncs == 1 and sum(reason in line for line in told) == 2
    assert all("requests go back into the queue" in line for line in told if "died" in line)
    assert [handle.life.restarts for handle in fleet.handles] == [1, 1]
    again = Counter(r.number for engine in engines for r in engine.added)
    first = {r.number for r in call.requests if again[r.number] == 1}
    assert first and max(again.values()) == 2


def test_a_sample_that_comes_twice_is_taken_once():
    """In the same call, and of a request that another engine has by now."""
    _, call, _ = drawn(FakeEngine(answers_twice=True), FakeEngine(answers_twice=True, die_at=3))
    assert call.syncs == 0


@pytest.mark.parametrize("seed", range(8))
def test_every_sample_comes_once_whatever_fails(seed):
    """Random faults of five engines in up to three of their lives, in groups and alone."""
    rng = random.Random(seed)

    def engine() -> FakeEngine:
        kind = rng.choice(["die_at", "lose_at", "hold_at", "none"])
        fault = {} if kind == "none" else {kind: rng.randrange(12)}
        return FakeEngine(
            faulty_lives=rng.randint(1, 3),
            answers_twice=rng.random() < 0.5,
            dies_of=rng.choice([(), (), ("load",), ("commit",), ("meet",)][: rng.randint(2, 4)]),
            hold_s=0.02,
            **fault,
        )

    engines = [engine() for _ in range(5)]
    drawn(*engines, count=rng.randint(1, 30), size=rng.randint(1, 6), max_restarts=5)


def test_a_silent_engine_is_suspect_gets_nothing_new_and_comes_back():
    engine = FakeEngine(hold_at=2, hold_s=0.55, pace_s=0.005)
    fleet, told = fleet_of(engine, FakeEngine(pace_s=0.005), engine_timeout_s=0.8)
    assert sync(fleet)
    at: dict[str, int] = {}

    def watch(sample: Sample) -> None:
        life = fleet.handles[0].life
        if life.state == "suspect":
            at.setdefault("suspect", len(engine.added))
            at["last"] = len(engine.added)

    Call(fleet, groups_of(180), watch).finish()
    assert at["suspect"] == at["last"] < len(engine.added)
    assert states_of(fleet) == ["healthy", "healthy"] and engine.lives == 1
    (warning,) = told
    assert warning == "WARNING: engine 0 on rank 0 has been silent for 0 s."


def test_an_engine_without_requests_may_be_silent():
    """However long it has been so when it gets some."""
    fleet, told = fleet_of(FakeEngine(), FakeEngine(pace_s=0.05), engine_timeout_s=0.7)
    assert sync(fleet)
    time.sleep(0.4)
    Call(fleet, groups_of(10)).finish()
    time.sleep(0.4)
    Call(fleet, groups_of(1)).finish()
    assert told == [] and states_of(fleet) == ["healthy"] * 2


def test_a_pause_is_not_counted_as_work():
    """While no engine holds the weights, none is busy."""
    fleet, _ = fleet_of(FakeEngine(die_at=0, pace_s=0.002))
    assert sync(fleet)
    call = Call(fleet, groups_of(2))
    assert not call.drawing.go_on()
    time.sleep(0.4)
    call.finish()
    assert call.drawing.seconds > 0.4 and call.drawing.use[0].busy_s < 0.3


def test_too_few_left_ends_the_run_with_their_names():
    """Engine 1 has no restart left; with it the last reasons of those that are lost."""
    engines = [FakeEngine(), FakeEngine(die_at=1, faulty_lives=9)]
    fleet, told = fleet_of(*engines, max_restarts=1, min_engines=2)
    assert sync(fleet)
    with pytest.raises(EngineError) as caught:
        for version in range(2, 9):
            Call(fleet, groups_of(20)).finish()
            sync(fleet, version)
    message = str(caught.value)
    assert message.startswith("1 of 2 vLLM engines are left, and rollout.min_engines=2. ")
    assert "engine 1 on rank 1: killed by SIGSEGV" in message and "engine 0" not in message
    assert "It is not started again, by rollout.max_restarts=1" in told[-1]
    assert not any(engine.alive for engine in engines), "the others are killed, too"


def test_the_run_goes_on_without_an_engine_that_is_lost():
    engines = [FakeEngine(), FakeEngine(dies_of=["add"], faulty_lives=99)]
    fleet, told = fleet_of(*engines, max_restarts=2)
    for version in range(6):
        assert sync(fleet, version)
        Call(fleet, groups_of(12)).finish()
    assert states_of(fleet) == ["healthy", "dead"] and engines[1].lives == 3
    assert len([line for line in told if "died" in line]) == 3


# Starting.


def test_an_engine_that_cannot_start_ends_the_run_with_its_log():
    """The first time: another start would fail alike."""
    fleet, _ = fleet_of(FakeEngine(), FakeEngine(dies_of=["start"]))
    with pytest.raises(EngineError) as caught:
        fleet.wait_for_start()
    assert str(caught.value).startswith("engine 1 on rank 1 cannot be started: killed by SIGSEGV.")
    assert "a line of its log" in str(caught.value)


@pytest.mark.parametrize("verb", ["start", "meet"])
def test_an_engine_that_hangs_while_it_starts(verb):
    fleet, _ = fleet_of(FakeEngine(ignores=[verb]), start_timeout_s=0.1)
    message = r"it was not ready within rollout.start_timeout_s=0.1: loading"
    with pytest.raises(EngineError, match=message):
        fleet.wait_for_start()


def test_an_engine_that_does_not_want_the_manifest():
    fleet, _ = fleet_of(FakeEngine(errors={"meet": "ValueError: the manifest changed"}))
    with pytest.raises(EngineError, match="failed to hear of the weights: ValueError: the man"):
        fleet.wait_for_start()


def test_a_wait_for_the_start_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(fleet_module, "TELL_INTERVAL_S", 0.05)
    fleet, told = fleet_of(FakeEngine(ignores=["start"]), FakeEngine(), start_timeout_s=0.4)
    with pytest.raises(EngineError):
        fleet.wait_for_start()
    assert set(told) == {"engine 0 on rank 0 starts, 0 s: loading"}


def test_a_restart_that_fails_is_one_of_those_in_a_row():
    """It hangs in its second life and dies in its third; the fourth is sound."""

    class SlowToRecover(FakeEngine):
        def _begin(self) -> None:
            super()._begin()
            self.ignores = ["start"] if self.lives == 2 else []
            self.dies_of = ["meet"] if self.lives == 3 else []

    engine = SlowToRecover(die_at=0, faulty_lives=3)
    fleet, told = fleet_of(engine, FakeEngine(), start_timeout_s=0.3)
    assert sync(fleet)
    Call(fleet, groups_of(6)).finish()
    wait_until_ready(fleet)
    assert sync(fleet, 2) and states_of(fleet) == ["healthy"] * 2
    assert engine.lives == 4 and fleet.handles[0].life.restarts_in_a_row == 3
    assert "It starts again, 3 of 3 times in a row" in told[-1]


# A call that is broken off.


def assert_killed(fleet: Fleet) -> None:
    assert states_of(fleet) == ["dead"] * len(fleet.handles)
    assert [handle.link.kills for handle in fleet.handles] == [1] * len(fleet.handles)


def test_a_call_that_takes_too_long_says_what_is_missing():
    fleet, _ = fleet_of(FakeEngine(hold_at=1), FakeEngine(), generate_timeout_s=0.1)
    assert sync(fleet)
    with pytest.raises(EngineError) as caught:
        Call(fleet, groups_of(10)).finish()
    message = str(caught.value)
    assert message.startswith("6 of 10 responses came within rollout.generate_timeout_s=0.1; ")
    assert "{'engine 0 on rank 0': 4, 'engine 1 on rank 1': 0}. Raise the time-out" in message
    assert_killed(fleet)


def test_what_take_raises_kills_the_engines_and_passes_on():
    """They would answer the next call with what was left of this one."""

    def take(sample: Sample) -> None:
        raise ValueError(f"sample {sample.number} is one too many")

    fleet, _ = fleet_of(FakeEngine(), FakeEngine())
    assert sync(fleet)
    with pytest.raises(ValueError, match="is one too many"):
        Call(fleet, groups_of(10), take).finish()
    assert_killed(fleet)
    assert sync(fleet, 2), "and they can be started again"
    Call(fleet, groups_of(10)).finish()


def test_a_call_is_left_when_the_run_must_stop():
    reasons = iter([None, None, "SIGTERM"])
    fleet, _ = fleet_of(FakeEngine(hold_at=0))
    assert sync(fleet)
    with pytest.raises(Interrupted, match="stopped by SIGTERM while vLLM was generating"):
        Call(fleet, groups_of(3), must_leave=lambda: next(reasons)).finish()
    assert_killed(fleet)


# Weights.


@pytest.mark.parametrize("verb", ["load", "commit"])
@pytest.mark.parametrize("kind", ["dies_of", "errors", "ignores"])
def test_an_engine_that_fails_in_a_sync_joins_the_next(verb, kind):
    """The others have the version; it has lost its process, so it is not a mixture of two."""
    fault = {verb: "ValueError: changed"} if kind == "errors" else [verb]
    fleet, told = fleet_of(FakeEngine(**{kind: fault}), FakeEngine())
    assert sync(fleet, timeout_s=0.1)
    assert states_of(fleet)[1] == "healthy" and not fleet.handles[0].life.serves
    reason = {
        "dies_of": "SIGSEGV",
        "errors": ", and others did not: ValueError: changed",
        "ignores": "it gave no answer within 0.1 s while ",
    }[kind]
    assert sum(reason in line for line in told) == 1
    wait_until_ready(fleet)
    assert sync(fleet, 2) and states_of(fleet) == ["healthy"] * 2
    assert [handle.link.version for handle in fleet.handles] == [2, 2]


@pytest.mark.parametrize("verb,doing", [("load", "taking the weights"), ("commit", "committing")])
def test_what_all_engines_refuse_is_no_fault_of_theirs(verb, doing):
    engines = [FakeEngine(errors={verb: "ValueError: a hole"}) for _ in range(2)]
    fleet, _ = fleet_of(*engines)
    with pytest.raises(EngineError) as caught:
        sync(fleet)
    assert str(caught.value) == "\n".join(
        f"engine {n} on rank {n} failed while {doing}: ValueError: a hole" for n in range(2)
    )


def test_a_sync_in_which_all_die_is_none():
    fleet, _ = fleet_of(FakeEngine(dies_of=["load"]), FakeEngine(dies_of=["commit"]))
    assert not sync(fleet) and not fleet.serving
    wait_until_ready(fleet)
    assert sync(fleet) and states_of(fleet) == ["healthy"] * 2


@pytest.mark.parametrize("verb", ["load", "commit"])
@pytest.mark.parametrize("end", ["answers", "is late"])
def test_who_answers_and_dies_while_others_are_awaited_does_not_serve(verb, end):
    """It has started again before they answer: a new process, which holds no weights."""
    first = FakeEngine(dies_after=[verb])
    other = FakeEngine(ignores=[verb]) if end == "is late" else FakeEngine(busy_for={verb: 20})
    fleet, told = fleet_of(first, other)
    assert sync(fleet, timeout_s=0.1 if end == "is late" else 30) == (end == "answers")
    assert first.lives == 2 and not fleet.handles[0].life.serves
    assert (states_of(fleet)[1] == "healthy") == (end == "answers")
    assert len(told) == (1 if end == "answers" else 2)


def prove(fleet: Fleet, *differences: float):
    loading = WeightLoading(fleet, MANIFEST, 30)
    loading.begin()
    loading.post([(0, {0: [{} for _ in fleet.handles]})])
    loading.finish()
    loading.commit(1)
    trainer = [[-0.5] * 8]
    for handle, difference in zip(fleet.handles, differences, strict=True):
        handle.link.values["score"] = [[-0.5 - difference] * 8]
    scores = loading.score([[1, 2, 3]])
    return loading.prove(scores, trainer, SyncCheck(WeightSyncConfig(), "float32"), 1)


def test_an_engine_that_does_not_hold_the_weights_is_killed_where_others_do():
    fleet, told = fleet_of(FakeEngine(), FakeEngine(), FakeEngine())
    probe = prove(fleet, 0.0, 3.0, 2e-5)
    assert probe.verdict == "sound" and probe.difference == pytest.approx(2e-5, rel=1e-3)
    assert states_of(fleet) == ["healthy", "restarting", "healthy"]
    assert fleet.handles[1].life.failed_probes == 1 and "does not hold" in told[0]


def test_when_no_engine_holds_the_weights_none_serves_and_the_worst_is_told():
    fleet, told = fleet_of(FakeEngine(), FakeEngine())
    probe = prove(fleet, 2.0, 3.0)
    assert probe.verdict == "stop" and probe.difference == pytest.approx(3.0)
    assert states_of(fleet) == ["stale"] * 2 and told == []


def test_engines_that_sleep_serve_after_the_next_sync():
    fleet, told = fleet_of(FakeEngine(), FakeEngine(errors={"sleep": "RuntimeError: awake"}))
    assert sync(fleet)
    fleet.sleep(on_same_devices=False)
    assert not fleet.serving and "failed while going to sleep, and others did not" in told[0]
    assert states_of(fleet) == ["stale", "restarting"], "nobody waits for it"
    assert not Call(fleet, groups_of(2)).drawing.go_on()
    wait_until_ready(fleet)
    assert sync(fleet, 2) and states_of(fleet) == ["healthy"] * 2


def test_on_the_students_devices_no_engine_is_awake_while_it_trains():
    """Not one that has died in the rollouts, nor one that dies of going to sleep."""
    fleet, _ = fleet_of(FakeEngine(dies_of=["sleep"]), FakeEngine(), FakeEngine())
    assert sync(fleet)
    fleet.handles[2].die("killed")
    fleet.sleep(on_same_devices=True)
    assert states_of(fleet) == ["stale"] * 3
    for handle in fleet.handles:
        verbs = [request.verb for request in handle.link.heard]
        assert verbs[-1] == "sleep", "the last that its present life heard"


def test_a_sync_within_a_call_does_not_count_as_its_time():
    """The engine starts again for longer than responses may take."""
    fleet, _ = fleet_of(FakeEngine(die_at=2), generate_timeout_s=0.4)
    assert sync(fleet)
    call = Call(fleet, groups_of(5))
    assert not call.drawing.go_on()
    time.sleep(0.6)
    wait_until_ready(fleet)
    assert sync(fleet)
    assert call.drawing.go_on()


def test_the_students_own_ranks_need_no_farewell():
    """They are in no exchange then, and a word that nobody takes would be waited for."""
    fleet, _ = fleet_of(FakeEngine(), FakeEngine())
    fleet.rest()
    fleet.end(Farewell(None))
    assert [handle.link._orders.end for handle in fleet.handles] == [None, None]


def test_the_end_reaches_every_rank_that_waits():
    heard = []

    class Waiting:
        def tell(self, orders: Orders) -> None:
            heard.append(orders)

        def flush(self) -> None: ...

    separate = {"placement": "separate", "world_size": 3, "min_engines": 1}
    fleet, _ = fleet_of(FakeEngine(), FakeEngine(), **separate)
    fleet._others = [Waiting()]
    fleet.rest()
    assert [handle.link.rests for handle in fleet.handles] == [1, 1] and heard == []
    farewell = Farewell("OSError: the disk is full")
    fleet.end(farewell)
    ends = [handle.link._orders.end for handle in fleet.handles] + [order.end for order in heard]
    assert ends == [farewell] * 3


# Between rank 0 and the rank that owns an engine.


class Process:
    """In the place of an EngineProcess."""

    def __init__(self) -> None:
        self.posts: list[Request] = []
        self.says: list[Reply] = []
        self.how: str | None = None
        self.kills = 0

    def post(self, request: Request) -> None:
        self.posts.append(request)

    def replies(self, wait_s: float) -> list[Reply]:
        says, self.says = self.says, []
        return says

    def death(self) -> str | None:
        return self.how

    def kill(self) -> None:
        self.kills, self.how = self.kills + 1, "killed by SIGKILL."

    def last_line(self) -> str:
        return "loading shards"

    def log_tail(self) -> str:
        return "Last lines of it"


def relay_of(arguments: dict) -> tuple[Relay, list[Process]]:
    processes: list[Process] = []

    def launch() -> Process:
        processes.append(Process())
        return processes[-1]

    return Relay(SimpleNamespace(launch=launch, arguments=arguments)), processes


def test_a_relay_carries_requests_and_replies_and_starts_and_kills():
    relay, (first, *_) = relay_of({"model": "m"})
    assert first.posts == [Request(0, "start", {"llm_arguments": {"model": "m"}})]
    assert relay.exchange(Orders()) == Report(last_line="loading shards")
    first.says = [Reply(0)]
    assert relay.exchange(Orders()) == Report((Reply(0),)), "it has started: no line more"
    request = Request(1, "add", {"requests": []})
    relay.exchange(Orders(requests=(request,)))
    assert first.posts[-1] == request
    first.says, first.how = [Reply(1, 7, is_part=True)], "exit code 1."
    assert relay.exchange(Orders()) == Report((Reply(1, 7, is_part=True),), death="exit code 1.")


def test_a_relay_starts_anew_without_the_process_before():
    relay, processes = relay_of({})
    assert relay.exchange(Orders(start=True, requests=(Request(5, "add"),))) == Report()
    first, second = processes
    assert first.kills == 1 and [r.verb for r in second.posts] == ["start"]
    second.says = [Reply(0, error="ValueError: no such model")]
    report = relay.exchange(Orders())
    assert report.death == "it failed to start: ValueError: no such model.\nLast lines of it"
    assert second.kills == 1
    assert relay.exchange(Orders(kill=True)).death == "killed by SIGKILL."


def test_orders_and_reports_cross_the_wire():
    """Of any size, until rank 0 lets the owner rest, or go for good; a rank 0 that is gone is an
    error."""
    relay, (process,) = relay_of({})
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(lambda r: JointWire(store, r, 2, 0.5 / 60, CPU), range(2))
        link = WireLink(ours, 1)
        serving = pool.submit(serve, theirs, relay)
        for size in (1, 100_000, 3):
            requests = tuple(Request(n, "add", {"text": "x" * size}) for n in range(3))
            process.says = [Reply(size, "y" * size)]
            link.tell(Orders(requests=requests))
            assert link.hear().replies == (Reply(size, "y" * size),)
            assert tuple(process.posts[-3:]) == requests
        link.tell(Orders(rest=True))
        assert serving.result(5) is None
        serving = pool.submit(serve, theirs, relay)
        link.tell(Orders(end=Farewell("OSError: full")))
        assert serving.result(5) == Farewell("OSError: full")
        with pytest.raises(LostRankError, match="Timed out"):
            pool.submit(serve, theirs, relay).result(5)


def test_an_error_without_words_is_a_reason_all_the_same():
    """Of several lines the first is told."""
    assert Farewell.after(None) == Farewell(None)
    assert Farewell.after(KeyError()) == Farewell("KeyError: ")
    assert Farewell.after(OSError("full\nof files")) == Farewell("OSError: full")
    assert Farewell.after(Interrupted("SIGTERM")).is_stop
