"""tools/convert_hf.py as a user starts it wrongly, or for help; what it converts is tested in
tests/distributed, and under torchrun in tests/e2e."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

CONVERT = Path(__file__).parents[1] / "tools/convert_hf.py"


def start(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    """Elsewhere than in the repository, and in an environment that torchrun did not make."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "arguments,answer",
    [
        (["--help"], "An interrupted conversion leaves OUT.unfinished"),
        (["to-hf", "--help"], "--max-shard-size SIZE"),
        (["to-mcore", "--help"], "--layout {plain,megatron-lm}"),
        (["to-mcore", "in", "out", "--iteration", "0"], "0 is not a positive number"),
        (["to-hf", "in", "out", "--max-shard-size", "5PB"], "'5PB' is no size; write 500MB or 5GB"),
        (["to-mcore", "in", "out", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["to-mcore", "in"], "the following arguments are required: OUT_DIR"),
    ],
)
def test_help_and_wrong_options_answer_at_once(arguments, answer, tmp_path):
    """That is, without importing torch."""
    script = f"""
import runpy, sys
sys.argv = {["convert_hf.py", *arguments]!r}
try:
    runpy.run_path({str(CONVERT)!r}, run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    done = start("-c", script, cwd=tmp_path)
    assert done.returncode == (0 if "--help" in arguments else 2)
    assert answer in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_sizes_are_decimal_or_binary(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tool sets it: undone after this test
    num_bytes = runpy.run_path(str(CONVERT))["num_bytes"]
    sizes = {"5GB": 5e9, "500MB": 5e8, "1.5 kB": 1500, "2GiB": 2**31, "1K": 1000, "60000": 60_000}
    assert {text: num_bytes(text) for text in sizes} == sizes
