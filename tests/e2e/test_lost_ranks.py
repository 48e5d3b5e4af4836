"""What is left when a process of a run dies, and how torchrun's restarts go on from there."""

import re
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_eopd.checkpoints.files import complete
from megatron_eopd.metrics.rows import read_metrics
from tests.e2e.jobs import SEPARATE, Job, job, repeat_recorded
from tests.living import is_alive, wait_until_gone

SAVE_ALWAYS = "checkpoint.save_interval=1"
THREE_ITERATIONS = ["training.train_iters=3", "checkpoint.export_hf=true"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return repeat_recorded(tmp_path_factory.mktemp("recorded"), 500)


@pytest.fixture(scope="module")
def undisturbed(recorded, tmp_path_factory) -> dict[str, Path]:
    """Three iterations with the teacher on the student's ranks, and on its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ways = {"beside": (2, []), "apart": (3, SEPARATE)}
    for name, (ranks, overrides) in ways.items():
        with job(folder / name, recorded, ranks, *THREE_ITERATIONS, *overrides) as run:
            _, stderr = run.torchrun.communicate(timeout=200)
            assert run.torchrun.returncode == 0, stderr
    return {name: folder / name for name in ways}


def test_a_teacher_on_its_own_rank_changes_nothing(undisturbed):
    """The metrics of three iterations are those of a run with the teacher beside the student."""
    rows = {name: read_metrics(path / "metrics.jsonl") for name, path in undisturbed.items()}
    table = (undisturbed["apart"] / "ranks.txt").read_text().splitlines()
    assert [line.split()[2:] for line in table[1:]] == [["tp0", "-"], ["tp1", "-"], ["-", "whole"]]
    stages = ("time/", "memory/", "throughput/", "weight_sync/")
    for row, plain in zip(rows["apart"], rows["beside"], strict=True):
        for key, value in plain.items():
            if not key.startswith(stages):
                assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_a_rank_that_dies_ends_all_others_with_the_stage_they_were_in(recorded, tmp_path):
    """The teacher's rank, and after torchrun has started all again a student's: every other rank
    ends within 30 s and has left a line that names a stage, and what served them is gone too."""
    options = ["training.train_iters=500", SAVE_ALWAYS, *SEPARATE]
    with job(tmp_path / "run", recorded, 3, *options, max_restarts=1) as run:
        run.wait_for(lambda: "step 3/" in run.log())
        first = [p for p in run.processes() if p.pid != run.torchrun.pid]
        run.rank(2).kill()
        wait_until_gone(lambda: [p for p in first if is_alive(p)], 30)
        assert_last_words(run, [0, 1])
        run.wait_for(lambda: "step" in run.log().partition("resumed from")[2])
        begin = time.monotonic()
        run.rank(1).kill()
        run.torchrun.communicate(timeout=60)
        assert run.torchrun.returncode != 0 and time.monotonic() - begin < 30
        wait_until_gone(run.processes, 5)
        assert_last_words(run, [0, 2])


def assert_last_words(run: Job, ranks: list[int]) -> None:
    for rank in ranks:
        last = run.log(rank).rstrip().rpartition("\n")[2]
        assert re.search(r"error.*(in stage |in iteration |in saving |\[teacher\])", last), run.log(
            rank
        )


def test_nothing_outlives_a_killed_torchrun(recorded, tmp_path):
    """Neither the ranks nor what they have started to write checkpoints."""
    options = ["training.train_iters=500", SAVE_ALWAYS]
    with job(tmp_path / "run", recorded, 2, *options) as run:
        run.wait_for(lambda: "step 3/" in run.log())
        run.torchrun.kill()
        wait_until_gone(run.processes, 5)


def test_torchrun_brings_a_run_back_that_ends_as_if_nothing_had_died(
    undisturbed, recorded, tmp_path
):
    """A rank is killed in the second iteration: the run resumes by itself from its first
    checkpoint, and ends with the weights of one that was left alone."""
    options = [*THREE_ITERATIONS, SAVE_ALWAYS]
    with job(tmp_path / "run", recorded, 2, *options, max_restarts=1) as run:
        run.wait_for((run.run_dir / "checkpoints/000001/DONE").is_file)
        run.rank(0).kill()
        _, stderr = run.torchrun.communicate(timeout=150)
        assert run.torchrun.returncode == 0, stderr
        wait_until_gone(run.processes, 5)
    assert "resumed from" in run.log()
    assert_same_end(run.run_dir, undisturbed["beside"])


def test_a_run_that_torchrun_stops_is_saved_and_goes_on(undisturbed, recorded, tmp_path):
    """Within an iteration, the separate teacher with it; long before the next checkpoint is due."""
    options = [*THREE_ITERATIONS, *SEPARATE]
    with job(tmp_path / "run", recorded, 3, *options) as run:
        run.wait_for(lambda: "step 1/" in run.log())
        begin = time.monotonic()
        run.torchrun.terminate()
        run.torchrun.communicate(timeout=60)
        assert run.torchrun.returncode != 0 and time.monotonic() - begin < 28
        wait_until_gone(run.processes, 5)
    for rank in range(3):
        assert "stopped" in run.log(rank).splitlines()[-1] and "error" not in run.log(rank)
    stopped_at = complete(run.run_dir)[-1].name
    with job(tmp_path / "run", recorded, 3, *options) as run:
        _, stderr = run.torchrun.communicate(timeout=150)
        assert run.torchrun.returncode == 0, stderr
    assert f"resumed from {run.run_dir}/checkpoints/{stopped_at}" in run.log()
    assert_same_end(run.run_dir, undisturbed["apart"])
    clocked = ("time/", "memory/", "engine/", "throughput/tokens_per_s", "weight_sync/seconds")
    ours, theirs = (
        [{n: v for n, v in row.items() if not n.startswith(clocked)} for row in rows]
        for rows in (read_metrics(d / "metrics.jsonl") for d in (run.run_dir, undisturbed["apart"]))
    )
    assert ours == theirs


def assert_same_end(run_dir: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "hf/model.safetensors") for path in (run_dir, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


@pytest.mark.engine
def test_engines_come_and_go_with_the_ranks(tmp_path):
    """A killed engine starts again beside ranks that live on. Where it may not, it is named and
    ends them; torchrun's restart brings another one, and that goes with a killed torchrun."""
    options = ["rollout.max_restarts=1", "training.train_iters=500", SAVE_ALWAYS]
    with job(tmp_path / "run", "none", 2, *options, max_restarts=1) as run:
        run.wait_for(lambda: "step 1/" in run.log())
        first, rank = engine_of(run), run.rank(0)
        first.kill()
        run.wait_for(lambda: "engine 0 on rank 0 died: killed by SIGKILL" in run.log())
        engine_of(run).kill()
        run.wait_for(lambda: "0 of 1 vLLM engines are left" in run.log(), seconds=60)
        run.wait_for(lambda: "step" in run.log().partition("resumed from")[2])
        assert is_alive(engine_of(run)) and not is_alive(rank)
        run.torchrun.kill()
        wait_until_gone(run.processes, 5)


def engine_of(run: Job) -> psutil.Process:
    """Of the ranks that run now."""
    children = run.rank(0).children()
    (found,) = [p for p in children if "megatron_eopd.rollout.vllm_child" in p.cmdline()]
    return found
