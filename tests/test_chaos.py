"""The judge of tests/chaos sees what it is there to see, on starts that are made up."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from megatron_eopd.checkpoints.files import sum_files, write_sums
from tests.chaos.faults import FAULTS, MOMENTS, flip_bit
from tests.chaos.harness import Outcome, see_it_through
from tests.chaos.judge import judge_start, look, tracebacks
from tests.chaos.plan import Planned, make_plan, next_round
from tests.chaos.runs import Kind
from tests.chaos.start import Start


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """With two sound checkpoints."""
    for iteration in (1, 2):
        directory = tmp_path / f"checkpoints/{iteration:06d}"
        directory.mkdir(parents=True)
        (directory / "position.json").write_text(json.dumps({"iteration": iteration}))
        write_sums(directory, sum_files(directory.iterdir()))
    return tmp_path


def start_that(said: str, output: str = "") -> SimpleNamespace:
    return SimpleNamespace(log=lambda: said, output=lambda: output, has_written=lambda path: False)


def test_the_newest_sound_checkpoint_must_be_loaded_and_damage_told(run_dir):
    first, second = (run_dir / f"checkpoints/00000{n}" for n in (1, 2))
    flip_bit(second / "position.json", Random(0))
    before = look(run_dir, {second})
    assert (before.newest, before.to_tell, before.unexpected) == (first, [second], [])
    warning = f"warning: {second} is damaged: … Going on from {first}.\n"

    def judged(said: str) -> str:
        return "; ".join(judge_start(start_that(said), before, {second}))

    assert judged(f"{warning}starts: at iteration 1\nresumed from {first}\n") == ""
    assert judged(f"starts: at iteration 1\nresumed from {first}\n") == (
        "went past 000002 without a word"
    )
    assert "loaded 000002; the newest sound one is 000001" in judged(f"resumed from {second}\n")
    assert "began anew beside 000001" in judged("starts: at iteration 0\n")
    again = f"{warning}resumed from {first}\nresumed from {second}\n"
    assert judged(again) == "loaded 000002, which is damaged"


def test_damage_that_nobody_did_is_seen(run_dir):
    """A fault must not leave a checkpoint that only looks complete."""
    (run_dir / "checkpoints/000002/position.json").write_text("{}")
    (problem,) = judge_start(start_that(""), look(run_dir, set()), set())
    assert problem.startswith("000002: position.json has ")


def test_tracebacks_count_but_torchruns_own():
    ours = "[rank0]: Traceback (most recent call last):\n[rank0]:   File …\n[rank0]: OSError: x\n"
    theirs = (
        "Traceback (most recent call last):\n  File …\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    plain = "Traceback (most recent call last):\n  File …\nKeyboardInterrupt\n"
    assert tracebacks(ours + theirs + plain) == ["OSError: x", "KeyboardInterrupt"]


def test_a_plan_is_its_seeds_and_holds_every_fault():
    plan = make_plan(2 * len(FAULTS), 7, FAULTS, engine=True)
    assert plan == make_plan(2 * len(FAULTS), 7, FAULTS, engine=True)
    assert plan != make_plan(2 * len(FAULTS), 8, FAULTS, engine=True)
    assert {p.fault.name for p in plan[: len(FAULTS)]} == {f.name for f in FAULTS}
    assert all(p.delay_s <= MOMENTS[p.moment].longest_delay_s for p in plan if p.moment)
    left, rounds = list(plan), []
    while left:
        rounds.append(next_round(left, 8))
    assert sorted(map(id, plan)) == sorted(id(p) for each in rounds for p in each)
    assert all(len({p.has_engine for p in each}) == 1 for each in rounds)


STEP = "2026-01-01 00:00:00 step 3/6 | loss 1\n"
DIED = (
    "2026-01-01 00:00:00 WARNING: engine 0 on rank 0 died: killed by SIGKILL.\n"
    "It starts again, 1 of 3 times in a row.\n"
)


class TalkingStart(Start):
    """Has said this since it was armed; then it ended with `code`, unless that is None."""

    def __init__(self, said: str, code: int | None = None):
        self.said_so_far = said
        self.torchrun = SimpleNamespace(
            returncode=code, poll=lambda: code, kill=lambda: None, wait=lambda: None
        )

    def new_log(self) -> str:
        return self.said_so_far

    def said(self) -> str:
        return ""

    def processes(self) -> list:
        return []


def seen(fault: str, start: Start) -> Outcome:
    """What the harness makes of a fault that was done to the start."""
    (found,) = (each for each in FAULTS if each.name == fault)
    planned = Planned(replace(found, limit_s=0.2), "iteration", 0.0, True, 0, 0)
    outcome = Outcome(fault, "")
    see_it_through(start, planned, outcome)
    return outcome


@pytest.mark.parametrize(
    "fault", ["SIGKILL of an engine", "engine held, then SIGKILL", "SIGSTOP of an engine"]
)
def test_an_engine_that_dies_is_told_and_the_run_goes_on(fault):
    """A step line in front of the death does not show it; without one the run hangs."""
    outcome = seen(fault, TalkingStart(DIED + STEP))
    assert (outcome.came_back, outcome.problems) == ("went on", [])
    assert outcome.said == "engine 0 on rank 0 died: killed by SIGKILL."
    for said in ("", STEP, DIED, STEP + DIED):
        assert seen(fault, TalkingStart(said)).problems == ["did not go on within 0 s"]


def test_an_engine_that_dies_behind_the_last_request_lets_the_run_finish():
    assert seen("SIGKILL of an engine", TalkingStart(STEP, 0)).came_back == "had finished"


def test_a_run_that_ends_with_its_engine_did_not_go_on():
    (problem,) = seen("SIGKILL of an engine", TalkingStart(DIED, 1)).problems
    assert problem.startswith("ended with code 1")


def test_a_rank_that_was_held_goes_on_without_a_word():
    assert seen("SIGSTOP, SIGCONT of a rank", TalkingStart(STEP)).problems == []
    assert seen("SIGSTOP, SIGCONT of a rank", TalkingStart("")).problems


def test_one_engine_and_two_are_to_end_alike(tmp_path):
    """Their undisturbed run is one."""
    one, two = (Kind(tmp_path, number, 3) for number in (1, 2))
    (tmp_path / "undisturbed-engine").mkdir()
    assert one.undisturbed() == two.undisturbed()
    assert "rollout.num_engines=2" in two.options and "rollout.replay=none" in two.options
