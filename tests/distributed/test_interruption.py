"""A run that is stopped, wherever that is, and goes on: the run that it would have been."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from megatron_eopd.checkpoints.files import complete
from megatron_eopd.config import load_config
from megatron_eopd.interruption import EXIT_STOPPED, Interruption
from megatron_eopd.metrics.rows import read_metrics
from megatron_eopd.parallel.init import free_port
from tests.ranks import start_ranks

ROOT = Path(__file__).parents[2]
STEPS = 3
OPTIONS = [
    "rollout.engine=megatron",
    "rollout.batch_size=12",
    "rollout.max_num_seqs=2",
    "rollout.max_response_length=8",
    "rollout.record=true",
    f"training.global_batch_size={12 // STEPS}",
    "training.micro_batch_size=2",
    "training.train_iters=3",
    "training.lr=1e-3",
    "training.lr_warmup_steps=0",
    "parallel.tensor_model_parallel_size=1",
    "checkpoint.save_interval=100",
    "checkpoint.keep_last=99",
    "evaluation.num_problems=4",
    "evaluation.samples_per_problem=1",
    "evaluation.interval=2",
    "logging.trackers=[]",
]
CLOCKED = ("time/", "memory/", "throughput/tokens_per_s", "weight_sync/seconds")
STOPS = [
    ("rollouts", 1, "000000"),  # before Adam has anything
    ("step 1", 1, "000000-2"),
    ("rollout", 2, "000001"),  # between two batches of responses
    ("rollouts", 1, "000001"),
    ("step 1 round 0", 1, "000001-1"),  # within a step, and so before it
    ("step 2", 1, "000001-3"),  # the last one
    ("evaluation", 2, "000002"),  # within it
]
"""At which point, after how many times there, each start is stopped; the checkpoint it leaves."""


def _rank(rank: int, port: int, options: list[str], stop_at: tuple[str, int] | None) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from megatron_eopd import launch, loop

    torch.set_num_threads(1)
    if rank == 1 and stop_at is not None:  # the others learn of it
        _signal_at(*stop_at)
    launch.on_every_rank(load_config(ROOT / "examples/quickstart/eopd.toml", options), loop.train)


def _signal_at(stop_at: str, times: int) -> None:
    pause, pause_in_wait = Interruption.pause, Interruption.pause_in_wait
    passed = []

    def come_to(point: str, interruption: Interruption) -> None:
        passed.append(point)
        if point == stop_at and passed.count(point) == times:
            os.kill(os.getpid(), signal.SIGTERM)
            while interruption._signals.noted is None:
                time.sleep(0.01)

    def noting_pause(self: Interruption, point: str, *args, **options) -> None:
        come_to(point, self)
        pause(self, point, *args, **options)

    def noting_pause_in_wait(self: Interruption) -> None:
        come_to(self._wait[0], self)
        pause_in_wait(self)

    Interruption.pause, Interruption.pause_in_wait = noting_pause, noting_pause_in_wait


def start(run_dir: Path, *overrides: str, stop_at: tuple[str, int] | None = None) -> int:
    """Its exit code."""
    options = [
        f"run_dir={run_dir}",
        f"data.prompts={run_dir.parent}/prompts.jsonl",
        *OPTIONS,
        *overrides,
    ]
    try:
        start_ranks(2, _rank, free_port(), options, stop_at)
    except ProcessExitedException as error:
        return error.exit_code
    return 0


def rows(run_dir: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.startswith(CLOCKED)}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(autouse=True)
def few_prompts(tmp_path, monkeypatch) -> None:
    """Twelve thousand take two seconds to read."""
    monkeypatch.chdir(ROOT)
    lines = [json.dumps({"prompt": f"{n} 7 8 8 -> 29 :", "answer": ""}) for n in range(1, 21)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))


def test_a_run_stopped_at_every_point_ends_as_if_it_had_not_been(tmp_path, capfd):
    """Weights, metrics, and what was sampled from which prompts, all bitwise; and each stop left a
    checkpoint where it was. Other batch sizes have to wait until an iteration is finished."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert start(straight) == 0
    for point, times, checkpoint in STOPS:
        assert start(stopped, stop_at=(point, times)) == EXIT_STOPPED, point
        assert complete(stopped)[-1].name == checkpoint, point
        if checkpoint == "000001-1":
            assert start(stopped, "training.global_batch_size=6") == 1
            assert "training.global_batch_size=4; now they are 12 and 6" in capfd.readouterr().err
    assert start(stopped) == 0
    assert rows(stopped) == rows(straight)
    for kind in ("hf/*.safetensors", "rollouts/*.jsonl"):
        ours, theirs = ({p.name: p.read_bytes() for p in d.glob(kind)} for d in (stopped, straight))
        assert ours == theirs and ours


def test_a_limit_that_is_over_ends_a_run_before_its_first_step(tmp_path):
    """Its place is saved all the same, so that nothing is a special case."""
    assert start(tmp_path / "run", "checkpoint.exit_duration_minutes=1e-6") == EXIT_STOPPED
    assert [path.name for path in complete(tmp_path / "run")] == ["000000"]
