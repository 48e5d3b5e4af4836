"""The loss benchmark through its command line, on a problem too small to say a thing about time."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CONTENDERS = ["ours", "modelopt", "nemo-rl"]
"""Those of others, and ours; what the plain forms compute is in the tests of the loss."""
HAVE_MODELOPT = importlib.util.find_spec("modelopt") is not None


@pytest.fixture
def bench_loss(tmp_path):
    """Run it with these options; returns its rows by contender, and what it printed."""

    def run(*options: str) -> tuple[dict[str, dict], str]:
        output = tmp_path / "bench.json"
        command = [sys.executable, "benchmarks/bench.py", "--only", "loss", "--output", str(output)]
        command += ["--tokens", "8", "--vocab", "512", "--repeats", "1", *options]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        rows = json.loads(output.read_text())["loss"]
        return {row["contender"]: row for row in rows}, done.stdout

    return run


@pytest.mark.slow
def test_contenders_compute_what_it_says(bench_loss):
    """Values and gradients agree with float64, to the rounding of float32 in sums over 512 tokens;
    who cannot run says why."""
    rows, printed = bench_loss("--cases", "float32", "--contenders", *CONTENDERS, "liger")
    assert list(rows) == [*CONTENDERS, "liger"]
    skipped = {name: row["skipped"] for name, row in rows.items() if "skipped" in row}
    assert skipped.pop("liger") == "UnavailableError: runs on CUDA only"
    if not HAVE_MODELOPT:
        assert "modelopt" in skipped.pop("modelopt")
    assert not skipped
    for name, row in rows.items():
        assert f"| {name} | 8 × 512 float32 |" in printed
        if "skipped" not in row:
            assert 0 <= row["value_error"] < 1e-4, name  # NaN is not below anything
            assert 0 <= row["gradient_error"] < 1e-4, name
            assert math.isfinite(row["memory_mb"]) and row["ms"]["p50"] > 0, name


def test_two_ranks_agree_with_one_collective(bench_loss):
    """Each rank hands over eight floats per token, once; its columns of the gradient are right."""
    rows, _ = bench_loss("--cases", "tp2", "--contenders", "ours")
    assert 0 <= rows["ours"]["gradient_error"] < 1e-4
    assert (rows["ours"]["collectives"], rows["ours"]["collective_bytes"]) == (1, 8 * 8 * 4)
