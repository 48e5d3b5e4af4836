"""Runs on recorded rollouts, with a teacher on its own ranks; and what is left when a rank dies."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_eopd.metrics.writer import read_metrics

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests/distributed/recorded/000000.jsonl"
SEPARATE = [
    "teacher.placement=separate",
    "teacher.world_size=1",
    "teacher.parallel.tensor_model_parallel_size=1",
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """The same rollouts for 500 iterations."""
    folder = tmp_path_factory.mktemp("recorded")
    for iteration in range(500):
        shutil.copy(RECORDED, folder / f"{iteration:06d}.jsonl")
    return folder


def start(run_dir: Path, recorded: Path, ranks: int, *overrides: str) -> subprocess.Popen:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={ranks}", "-m", "megatron_eopd.train"),
        *("examples/quickstart/eopd.toml", f"run_dir={run_dir}", f"rollout.replay={recorded}"),
        *("rollout.batch_size=32", "training.global_batch_size=16", "training.micro_batch_size=4"),
        *("evaluation.task=none", "checkpoint.export_hf=false", "training.lr_warmup_steps=0"),
        *overrides,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_teacher_on_its_own_rank_changes_nothing(recorded, tmp_path):
    """The metrics of three iterations are those of a run with the teacher beside the student."""
    ways = {"beside": (2, []), "apart": (3, SEPARATE)}
    rows = {}
    for name, (ranks, overrides) in ways.items():
        process = start(tmp_path / name, recorded, ranks, "training.train_iters=3", *overrides)
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
        rows[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    table = (tmp_path / "apart/ranks.txt").read_text().splitlines()
    assert [line.split()[2:] for line in table[1:]] == [["tp0", "-"], ["tp1", "-"], ["-", "whole"]]
    stages = ("time/", "memory/", "throughput/", "weight_sync/")
    for row, plain in zip(rows["apart"], rows["beside"], strict=True):
        for key, value in plain.items():
            if not key.startswith(stages):
                assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("lost", [1, 2])
def test_a_rank_that_dies_ends_all_others_with_the_stage_they_were_in(lost, recorded, tmp_path):
    """A student's rank and the teacher's, in the middle of training: every other rank ends within
    30 s and has left a line that names a stage."""
    run_dir = tmp_path / "run"
    process = start(run_dir, recorded, 3, "training.train_iters=500", *SEPARATE)
    family = await_training(process, run_dir)
    ranks = [p for p in family if "RANK" in p.environ()]
    (victim,) = [p for p in ranks if p.environ()["RANK"] == str(lost)]
    begin = time.monotonic()
    victim.kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - begin < 30
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    for rank in {0, 1, 2} - {lost}:
        told = (run_dir / f"log/rank{rank}.txt").read_text()
        last = told.rstrip().rpartition("\n")[2]
        assert "error" in last and ("in stage " in last or "[teacher]" in last), told + stderr


def await_training(process: subprocess.Popen, run_dir: Path) -> list[psutil.Process]:
    """All processes of the run, once it has taken some steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = run_dir / "log/rank0.txt"
        if log.is_file() and "step 5/" in log.read_text():
            return psutil.Process(process.pid).children(recursive=True)
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    raise AssertionError("no step within 120 s")
