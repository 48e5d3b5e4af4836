"""What a rank leaves that ends in a way no Python code sees, and what the next start says of it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_eopd.run_log import RunLog

ROOT = Path(__file__).parents[1]
PAIR = """
import os, sys, time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_eopd.run_log import RunLog, StageTimes, gauge_of

folder, rank, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group(
    "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20)
)
log = RunLog(folder, rank)
log.keep_last_words()
times = StageTimes(log, f"iteration 7 on rank {rank}", gauge_of(torch.device("cpu")))
with times("score"):
    dist.all_reduce(torch.zeros(1))
with times("step"):
    if rank == 1 and how == "abort":
        os.abort()  # as NCCL's watchdog does
    if rank == 1 and how == "kill":
        os.kill(os.getpid(), 9)
    if rank == 1 and how == "raise":
        raise ValueError("told by Python itself")
    dist.all_reduce(torch.zeros(1))
"""


def run_pair(folder: Path, how: str) -> list[int]:
    """Exit codes of two ranks over gloo, of which the second ends as `how` says."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(folder), str(rank), how],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    return [rank.wait(timeout=120) for rank in ranks]


def next_start(folder: Path, rank: int, capsys: pytest.CaptureFixture) -> str:
    """What it says on the terminal."""
    log = RunLog(folder, rank)
    log.keep_last_words()
    log.close()
    return "".join(capsys.readouterr())


def test_an_aborted_rank_is_named_with_its_stage_by_the_next_start(tmp_path, capsys):
    """The one that aborted on the terminal, with the line it was in; the other one had told of a
    lost rank by itself, and is not named."""
    codes = run_pair(tmp_path, "abort")
    assert codes[1] == -signal.SIGABRT and codes[0] == 1
    said = next_start(tmp_path, 1, capsys)
    assert re.search(
        r"rank 1, in the start before this one, ended in stage step of iteration 7 on rank 1 with: "
        r"Fatal Python error: Aborted",
        said,
    )
    assert 'File "<string>", line' in said
    assert said.split("\n")[0] in (tmp_path / "log/rank1.txt").read_text()
    assert next_start(tmp_path, 0, capsys) == ""
    assert next_start(tmp_path, 1, capsys) == "", "it is told once"


def test_a_killed_rank_is_named_in_its_file(tmp_path, capsys):
    """Not on the terminal: with a killed torchrun all ranks are."""
    assert run_pair(tmp_path, "kill")[1] == -signal.SIGKILL
    assert next_start(tmp_path, 1, capsys) == ""
    told = (tmp_path / "log/rank1.txt").read_text()
    assert "was killed, by the system or by hand, in stage step of iteration 7 on rank 1" in told


def test_a_rank_that_leaves_by_itself_leaves_none(tmp_path):
    """By an exception, whose traceback says all of it."""
    assert run_pair(tmp_path, "raise") == [1, 1]
    assert not list(tmp_path.glob("log/*.last_words.txt"))


def test_a_fork_of_a_rank_does_not_speak_for_it(tmp_path):
    log = RunLog(tmp_path, 0)
    log.keep_last_words()
    child = os.fork()
    if child == 0:
        log.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "log/rank0.last_words.txt").exists()
    log.close()
    assert not (tmp_path / "log/rank0.last_words.txt").exists()


def test_a_stage_costs_microseconds(tmp_path):
    """Under 100 of them, with a wide margin: it is noted several times a microbatch."""
    log = RunLog(tmp_path, 0)
    log.keep_last_words()
    begin = time.perf_counter()
    for n in range(1000):
        log.stage = f"stage {n}"
    seconds = (time.perf_counter() - begin) / 1000
    log.close()
    assert seconds < 100e-6, f"{seconds * 1e6:.0f} µs"
