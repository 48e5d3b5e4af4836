"""The loss benchmark and its contenders, on a problem too small to say a thing about time."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
HAVE_MODELOPT = importlib.util.find_spec("modelopt") is not None
CASE = {"contenders": [], "tokens": 8, "vocab": 512}
# Others' losses need no process of their own where nobody looks at memory or time.
OTHERS = f"""
import json
from loss_worker import Case, worker

case = Case("float32", **{CASE!r})
print(json.dumps([worker(name, [case], 1)[0] for name in ("modelopt", "nemo-rl")]))
"""


def run(*arguments: object) -> str:
    """What Python prints on CPU."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )
    # ModelOpt's process sometimes aborts while it exits, behind its last line.
    assert done.returncode == 0 or done.stdout.endswith("]\n"), done.stderr
    return done.stdout


def python_path() -> str:
    """With the benchmarks, and what `make test` has laid over the environment."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(REPOSITORY / "benchmarks"), *([given] if given else [])])


def assert_right(row: dict) -> None:
    """To the rounding of float32 in sums over 512 tokens; and something was measured."""
    assert 0 <= row["value_error"] < 1e-4, row["contender"]  # NaN is not below anything
    assert 0 <= row["gradient_error"] < 1e-4, row["contender"]
    assert math.isfinite(row["memory_mb"]) and row["ms"]["p50"] > 0, row["contender"]


@pytest.mark.slow
def test_the_command_measures_us_and_says_who_cannot_run(tmp_path):
    """Values and gradients agree with float64; the table shows what the file has."""
    output = tmp_path / "bench.json"
    sizes = ("--tokens", 8, "--vocab", 512, "--repeats", 1, "--cases", "float32")
    contenders = ("--contenders", "ours", "liger")
    command = ("benchmarks/bench.py", "--only", "loss", "--output", output)
    printed = run(*command, *sizes, *contenders)
    ours, liger = json.loads(output.read_text())["loss"]
    assert (ours["contender"], liger["contender"]) == ("ours", "liger")
    assert liger["skipped"] == "UnavailableError: runs on CUDA only"
    assert "| liger | 8 × 512 float32 | skipped: UnavailableError" in printed
    assert "| ours | 8 × 512 float32 |" in printed
    assert_right(ours)


def test_the_losses_of_others_compute_what_it_says():
    """Values and gradients agree with float64; ModelOpt's may be absent, and then says so."""
    modelopt, nemo_rl = json.loads(run("-c", OTHERS).splitlines()[-1])
    assert_right(nemo_rl)
    if HAVE_MODELOPT:
        assert_right(modelopt)
    else:
        assert "modelopt" in modelopt["skipped"]


TWO_RANKS = """
import json
from bench_loss import cpu_cases, run_worker

cases = [case for case in cpu_cases(tokens=8, vocab=512) if case.name == "tp2"]
print(json.dumps(run_worker("ours", cases, 1)))
"""


def test_two_ranks_agree_with_one_collective():
    """Each rank hands over eight floats per token, once; its columns of the gradient are right."""
    (ours,) = json.loads(run("-c", TWO_RANKS).splitlines()[-1])
    assert ours["case"]["tp"] == 2
    assert 0 <= ours["gradient_error"] < 1e-4
    assert (ours["collectives"], ours["collective_bytes"]) == (1, 8 * 8 * 4)
