"""The judge of tests/chaos sees what it is there to see, on starts that are made up."""

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from megatron_eopd.checkpoints.files import sum_files, write_sums
from tests.chaos.faults import FAULTS, MOMENTS, flip_bit
from tests.chaos.judge import judge_start, look, tracebacks
from tests.chaos.plan import make_plan, next_round


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
