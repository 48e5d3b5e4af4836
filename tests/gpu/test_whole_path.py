"""The trainer's way on this machine's device: a GPU, or the CPU, so that what a GPU will be asked
has been run before. `make test-gpu` writes the figures to runs/test_gpu.md.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eopd.metrics.rows import read_metrics
from tests.e2e.jobs import job

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "runs/test_gpu.md"
NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
IMPLS = ["local", "transformer_engine"]
HEADS = ["materialized", "chunked"]
DTYPES = ["float32", "bfloat16"]

needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@pytest.fixture(scope="module")
def note() -> Iterator[Callable[[str, Any, str], None]]:
    """A row of the table: what, on what, with which figures."""
    rows: list[str] = []
    yield lambda what, device, figures: rows.append(f"| {what} | {device} | {figures} |")
    TABLE.parent.mkdir(exist_ok=True)
    head = ["| what | device | figures |", "|---|---|---|"]
    TABLE.write_text("\n".join([*head, *rows]) + "\n")


@pytest.fixture(params=[1, 2], ids=["one", "two"])
def ranks(request) -> int:
    if NUM_GPUS and request.param > NUM_GPUS:
        pytest.skip(f"needs {request.param} GPUs, and there is {NUM_GPUS}")
    return request.param


@pytest.fixture(params=IMPLS)
def impl(request) -> str:
    if request.param == "transformer_engine" and not (
        NUM_GPUS and importlib.util.find_spec("transformer_engine")
    ):
        pytest.skip("TransformerEngine needs a GPU, and to be installed")
    return request.param


def run(ranks: int, **case: Any) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={ranks}", "-m", "tests.gpu.whole_path", json.dumps(case, default=str)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-3000:]
    (line,) = [li for li in told.stdout.splitlines() if "FIGURES " in li]
    return json.loads(line.partition("FIGURES ")[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_as_close_to_float32_as_those_of_transformers(
    dtype, impl, ranks, qwen3_dir, teacher_dir, note
):
    """In bfloat16 at most twice as far as transformers' own bfloat16; in float32 within 1e-4, or
    within a GPU's TF32."""
    found = run(
        ranks, part="logits", student=qwen3_dir, teacher=teacher_dir, dtype=dtype, impl=impl
    )
    what = f"logits, {impl}, {dtype}, TP {ranks}"
    note(what, found["device"], f"{found['ours']:.2e}; transformers {found['transformers']:.2e}")
    floor = 1e-4 if found["device"] == "CPU" else 1e-3 * found["largest"]
    assert found["ours"] <= max(floor, 2 * found["transformers"]), found


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_heads_take_the_same_step(dtype, impl, ranks, qwen3_dir, teacher_dir, note):
    """Loss and gradient norm, and the second step on a batch lowers its loss. Within 1e-4 in
    float32; in bfloat16 only one of them rounds the head's weight gradient: 2 %."""
    case = {"part": "step", "student": qwen3_dir, "teacher": teacher_dir, "dtype": dtype}
    whole, chunked = (run(ranks, head=head, impl=impl, **case) for head in HEADS)
    for head, found in zip(HEADS, (whole, chunked), strict=True):
        what = f"two steps, {impl}, {dtype}, {head}, TP {ranks}"
        note(what, found["device"], f"loss {found['loss'][0]:.6f}, {found['seconds']:.2f} s")
        assert found["loss"][1] < found["loss"][0], found
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert chunked["loss"] == pytest.approx(whole["loss"], rel=tolerance)
    assert chunked["grad_norm"] == pytest.approx(whole["grad_norm"], rel=tolerance)


@needs_engine
@pytest.mark.engine
def test_a_run_with_vllm_syncs_saves_and_resumes(ranks, tmp_path, note):
    """Two iterations, the weights of each taken by the engine and checked there, the probe with it;
    then a third one from the checkpoint."""
    options = ["checkpoint.save_interval=1", "training.lr_decay_iters=3"]
    options += [f"parallel.tensor_model_parallel_size={ranks}"]
    for iterations in (2, 3):
        more = [*options, f"training.train_iters={iterations}"]
        with job(tmp_path / "run", "none", ranks, *more) as started:
            _, stderr = started.torchrun.communicate(timeout=280)
            assert started.torchrun.returncode == 0, stderr[-3000:]
    assert "resumed from" in started.log()
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    device = torch.cuda.get_device_name() if NUM_GPUS else "CPU"
    figures = "; ".join(
        f"{name} {rows[-1][name]:.2f}"
        for name in ("time/total", "time/rollout", "time/sync")
        if name in rows[-1]
    )
    note(f"a run with vLLM, TP {ranks}", device, figures)
    assert len(rows) == 3
