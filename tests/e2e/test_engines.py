"""Whole runs with engines in other numbers and places, that die on the way: the same to the bit."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_eopd.metrics.rows import read_metrics
from tests.living import is_alive

ROOT = Path(__file__).parents[2]
QUICKSTART = "examples/quickstart/eopd.toml"
OPTIONS = [
    "training.train_iters=5",
    "rollout.batch_size=64",
    "rollout.samples_per_prompt=4",
    "rollout.record=true",
    "training.global_batch_size=32",
    "training.lr_warmup_steps=1",
    "evaluation.tasks=none",
    "checkpoint.export_hf=false",
]
pytestmark = pytest.mark.engine
COLOCATED = ["rollout.num_engines=2"]
SEPARATE = ["rollout.placement=separate", "rollout.world_size=2", "rollout.num_engines=none"]


def command(run_dir: Path, ranks: int, program: list[str], *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={ranks}", *program, QUICKSTART, f"run_dir={run_dir}"),
        *(*OPTIONS, *options),
    ]


def run(arguments: list[str]) -> str:
    """What it said; nothing of it lives on."""
    mark = {"KILLED_ENGINES_TEST": str(time.monotonic_ns())}
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | mark,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left = [p for p in psutil.process_iter() if is_alive(p) and _has(p, mark)]
    assert not left
    return done.stdout


def _has(process: psutil.Process, mark: dict[str, str]) -> bool:
    try:
        return mark.items() <= process.environ().items()
    except psutil.Error:
        return False


def timeless(run_dir: Path) -> list[dict]:
    clocked = re.compile(
        r"time/|throughput/tokens_per_s|memory/|engine/|weight_sync/\w+_s$|.*seconds"
    )
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not clocked.match(k)} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """One engine, on the first of two ranks."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(command(run_dir, 2, ["-m", "megatron_eopd.train"]))
    return run_dir


@pytest.mark.parametrize("placement,ranks", [(COLOCATED, 2), (SEPARATE, 4)])
def test_engines_that_die_leave_no_trace(undisturbed, tmp_path, placement, ranks):
    """One of two in the middle of a call, the other in a sync, and one while it starts again: every
    sample is there once, all metrics are the same, and no process or shared memory is left."""
    segments = set(Path("/dev/shm").iterdir())
    said = run(command(tmp_path / "run", ranks, ["tests/e2e/killed_engines.py"], *placement))
    assert said.count("killed engine") >= 4 and said.count("died: killed by SIGKILL") >= 3
    for file in sorted((undisturbed / "rollouts").iterdir()):
        assert (tmp_path / "run/rollouts" / file.name).read_bytes() == file.read_bytes()
    assert timeless(tmp_path / "run") == timeless(undisturbed)
    assert set(Path("/dev/shm").iterdir()) <= segments


def test_weights_cross_hosts(undisturbed, tmp_path):
    """Two torchruns stand for two hosts. Each leads a pipeline stage and has an engine, so stages
    cross both ways; samples are those of one host."""
    port = str(29_000 + os.getpid() % 1000)
    hosts = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                *(f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1"),
                *(f"--master_port={port}", "-m", "megatron_eopd.train", QUICKSTART),
                *(f"run_dir={tmp_path / 'run'}", *OPTIONS, "training.train_iters=1"),
                *("parallel.tensor_model_parallel_size=1", "rollout.num_engines=2"),
                "parallel.pipeline_model_parallel_size=2",
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    (row,) = (r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss/total" in r)
    assert row["weight_sync/hop_s"] > 0 and row["engine/alive"] == 2
    first = "rollouts/000000.jsonl"
    assert (tmp_path / "run" / first).read_bytes() == (undisturbed / first).read_bytes()
