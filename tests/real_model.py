"""A real pair of models for checks: SmolLM2-135M-Instruct, and the same without some layers."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "runs/smollm2_gsm8k"
"""Where the example has its models; a teacher that is fetched stays there for the next run."""
FETCH_TIMEOUT_S = 600


def real_model_dirs(tmp_root: Path) -> tuple[Path, Path]:
    """(teacher, student): the example's where it has them. Otherwise the teacher is fetched, or the
    test skipped, and the student is the teacher without every sixth of 30 layers, in `tmp_root`."""
    teacher, student = KEPT / "teacher", KEPT / "student"
    if not (teacher / "config.json").is_file():
        _fetch(teacher)
    if not (student / "config.json").is_file():
        student = tmp_root / "student"
        if not student.exists():
            dropped = _run("tools/drop_layers.py", teacher, student, "--layers", "6,12,18,24")
            assert dropped.returncode == 0, dropped.stderr
    return teacher, student


def _fetch(teacher: Path) -> None:
    try:
        fetched = _run("examples/smollm2_gsm8k/fetch_teacher.py", teacher)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the real model was not fetched within {FETCH_TIMEOUT_S} s")
    if fetched.returncode != 0:
        errors = [line for line in fetched.stderr.splitlines() if line.startswith("error: ")]
        reason = errors[0] if errors else fetched.stderr[-200:]
        pytest.skip(f"the real model cannot be fetched here: {reason}")


def _run(tool: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: tests that fork ranks need a parent without anybody's threads."""
    return subprocess.run(
        [sys.executable, str(ROOT / tool), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=FETCH_TIMEOUT_S,
    )
