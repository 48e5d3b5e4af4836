"""Whole runs that begin on reference answers, are killed, and go on; and one with a faulty sync."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_eopd.metrics.rows import read_metrics
from megatron_eopd.tasks import countdown
from tests.e2e.test_train import QUICKSTART, ROOT, command, timeless, train

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def warm_up(tmp_path_factory) -> list[str]:
    """Overrides: Countdown problems with a right answer each, held-out ones of the run's own."""
    path = tmp_path_factory.mktemp("prompts")
    for name, split, count in (("prompts", "train", 400), ("held_out", "test", 12)):
        rows = [
            {
                "prompt": problem.prompt_text(),
                "answer": str(problem.target),
                "response": countdown.all_problems()[problem][0],
            }
            for problem in countdown.split(split)[:count]
        ]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"data.prompts={path / 'prompts.jsonl'}",
        "data.response_key=response",
        "rollout.reference_fraction=1",
        "rollout.final_reference_fraction=0",
        "rollout.reference_schedule_iters=3",
        f"evaluation.tasks=number={path / 'held_out.jsonl'}",
        "evaluation.interval=2",
        "training.train_iters=4",
        "checkpoint.save_interval=1",
        "rollout.engine=megatron",  # vLLM's part in a resume is in test_train.py
    ]


def kill_at(run_dir: Path, line: str, *overrides: str) -> None:
    """Start a training, and SIGKILL torchrun and the ranks when their log has the line."""
    process = subprocess.Popen(
        command(run_dir, *overrides),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, deadline = run_dir / "log/rank0.txt", time.monotonic() + 180
    while not (log.is_file() and re.search(line, log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, f"{line!r} never came"
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    for member in [process, *family]:
        member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=20)


def test_a_run_killed_in_its_warm_up_and_after_it_is_the_same_run(warm_up, tmp_path):
    """Bitwise, with references, both sources mixed, and samples alone; its figures tell them
    apart."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = train(straight, *warm_up)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in timeless(straight) if "loss/total" in row]
    shares = [row["rollout/reference_fraction"] for row in rows]
    assert shares[0] == 1 and shares[-1] == 0 and 0 < shares[1] < 1
    assert "reference/reverse_kl" in rows[0] and "sampled/reverse_kl" not in rows[0]
    assert "rollout/length_mean" not in rows[0] and rows[0]["reference/length_mean"] == 18
    assert {"reference/loss", "sampled/loss", "mismatch/logprob_abs_mean"} <= rows[1].keys()
    assert "reference/loss" not in rows[-1] and rows[-1]["sampled/loss"] == rows[-1]["loss/total"]
    (last,) = [
        row for row in timeless(straight) if row["iteration"] == 4 and "loss/total" not in row
    ]
    assert 0 <= last["eval/held_out/accuracy_low"] <= last["eval/held_out/avg@4"]
    names = (ROOT / "docs/metrics.md").read_text()
    for name in {name for row in rows for name in row} - {"iteration"}:
        documented = re.sub(r"^(by_position|by_entropy)/\d+/", r"\1/N/", name)
        assert f"`{documented}`" in names, f"{name} is not in docs/metrics.md"

    kill_at(killed, r"step 1/4", *warm_up)
    kill_at(killed, r"step 3/4", *warm_up)
    done = train(killed, *warm_up)
    assert done.returncode == 0, done.stdout + done.stderr
    assert timeless(killed) == timeless(straight)


def test_references_alone_need_no_engine(warm_up, tmp_path):
    done = train(
        tmp_path / "run",
        *warm_up[:2],
        "rollout.reference_fraction=1",
        "evaluation.tasks=none",
        "training.train_iters=1",
        "parallel.tensor_model_parallel_size=1",
        ranks=1,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rollouts: none; every iteration trains on reference answers" in done.stdout
    assert not (tmp_path / "run/log/engine0.txt").exists()


@pytest.mark.engine
def test_a_missed_update_stops_the_run_after_everything_is_written(tmp_path):
    """By the likely tokens of prompts and responses; the reason is what torchrun ends with, too."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(str(Path(__file__).parent / "skipped_sync.py"), QUICKSTART),
            *(f"run_dir={tmp_path / 'run'}", "rollout.batch_size=32", "training.lr=1e-3"),
            *("training.global_batch_size=16", "training.lr_warmup_steps=0"),
            *("training.train_iters=5", "evaluation.tasks=none", "checkpoint.save_interval=50"),
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    reason = "error: after the sync of weight version 2 the engine's log-probabilities of"
    assert reason in done.stderr
    assert reason in done.stderr.split("Root Cause")[1], "torchrun closes with the reason"
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2]
    first, second = (row["weight_sync/probe_difference"] for row in rows)
    assert first < 3e-5 and second > 3e-4
    checkpoint = tmp_path / "run/checkpoints/000002"
    assert (checkpoint / "DONE").is_file()
    # The evaluation that may be due there is made when the run goes on.
    assert not json.loads((checkpoint / "position.json").read_text())["is_evaluated"]
