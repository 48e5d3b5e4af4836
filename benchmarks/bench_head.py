"""Memory and time of the LM heads and the loss together, materialized against chunked.

Each head runs in a process of its own, whose peak memory is then its own; bench.py --only head
prints both. Random hidden states and LM heads stand for the models. On CUDA they have the size and
type of real ones, and the peak is that of the device's memory.
"""
# Shapes: N tokens, H student hidden size, T teacher's, V vocabulary.

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses import vocab_parallel_kl_terms
from megatron_eopd.losses.chunked_head import chunk_size, chunked_head_loss

HEADS = ("materialized", "chunked")
THRESHOLD = ObjectiveConfig().entropy_threshold


@dataclass(frozen=True)
class Shape:
    """One problem; by default small enough for a CPU."""

    tokens: int = 2048
    hidden: int = 64
    teacher_hidden: int = 128
    dtype: str = "float32"
    vocab: int = 151_936
    device: str = "cpu"

    @property
    def chunk_size(self) -> int:
        return chunk_size(ObjectiveConfig(), self.device == "cuda")


ON_CUDA = Shape(16_384, 1024, 2048, "bfloat16", device="cuda")
"""Qwen3-0.6B beside 1.7B."""


def bench_head() -> dict[str, Any]:
    """Reverse KL + gated forward KL from hidden states to the gradients of hidden states and of
    the LM head, TP 1."""
    shape = ON_CUDA if torch.cuda.is_available() else Shape()
    results, gradients = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for head in HEADS:
            file = Path(folder) / f"{head}.pt"
            command = [sys.executable, __file__, head, json.dumps(asdict(shape)), str(file)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[head] = json.loads(done.stdout.splitlines()[-1])
            gradients[head] = torch.load(file)
    whole, chunked = (results[head] for head in HEADS)
    difference = max(
        ((a.double() - b.double()).abs().max() / a.abs().max()).item()
        for a, b in zip(*(gradients[head] for head in HEADS), strict=True)
    )
    return {
        "shape": f"N = {shape.tokens:,}, V = {shape.vocab:,}, H = {shape.hidden} / "
        f"{shape.teacher_hidden}, {shape.dtype}, TP 1, chunks of {shape.chunk_size:,}",
        "materialized: peak, MB": whole["peak"] / 1e6,
        "chunked: peak, MB": chunked["peak"] / 1e6,
        "peak ratio": whole["peak"] / chunked["peak"],
        "materialized: seconds": whole["seconds"],
        "chunked: seconds": chunked["seconds"],
        "largest relative difference of loss and gradients": difference,
    }


def run_head(head: str, shape: Shape) -> tuple[list[torch.Tensor], float]:
    """(loss, gradient of the hidden states, gradient of the weight), seconds."""
    torch.manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        dtype = getattr(torch, shape.dtype)
        return torch.randn(rows, columns, dtype=dtype, device=shape.device)

    hidden_NH = random(shape.tokens, shape.hidden).requires_grad_()
    # Logits have a spread of 1.
    weight_VH = (random(shape.vocab, shape.hidden) / shape.hidden**0.5).requires_grad_()
    # The float32 buffer that a model in Megatron's wrapper has.
    weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
    teacher_NT = random(shape.tokens, shape.teacher_hidden)
    teacher_VT = random(shape.vocab, shape.teacher_hidden) / shape.teacher_hidden**0.5

    def loss_of_rows(logits: torch.Tensor, rows: slice, inplace: bool) -> torch.Tensor:
        terms = vocab_parallel_kl_terms(
            logits, teacher_NT[rows] @ teacher_VT.T, inplace_backward=inplace
        )
        gate = (terms.teacher_entropy >= THRESHOLD).float()
        return (terms.reverse_kl + gate * terms.forward_kl).sum()

    def run() -> torch.Tensor:
        hidden_NH.grad = None
        weight_VH.main_grad.zero_()
        if head == "chunked":
            loss = chunked_head_loss(
                hidden_NH,
                weight_VH,
                lambda logits, rows: loss_of_rows(logits, rows, inplace=True),
                chunk_size=shape.chunk_size,
                tp_group=dist.group.WORLD,
            )
        else:
            loss = loss_of_rows(hidden_NH @ weight_VH.T, slice(None), inplace=False)
        loss.backward()
        if head == "materialized":  # else it is there
            weight_VH.main_grad.add_(weight_VH.grad)
        weight_VH.grad = None
        return loss.detach()

    if shape.device == "cuda":  # the first run compiles
        run()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    loss = run()
    if shape.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return [x.cpu() for x in (loss, hidden_NH.grad, weight_VH.main_grad)], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="One head, in this process; see bench.py.")
    parser.add_argument("head", choices=HEADS)
    parser.add_argument("shape", type=json.loads, help="fields of Shape, as JSON")
    parser.add_argument("gradients", type=Path, help="file to write loss and gradients to")
    arguments = parser.parse_args()
    shape = Shape(**arguments.shape)
    backend = "nccl" if shape.device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/r", rank=0, world_size=1)
        results, seconds = run_head(arguments.head, shape)
        dist.destroy_process_group()
    peak = torch.cuda.max_memory_allocated() if shape.device == "cuda" else peak_bytes()
    torch.save(results, arguments.gradients)
    print(json.dumps({"peak": peak, "seconds": seconds}))


def peak_bytes() -> int:
    """Of this program alone: ru_maxrss is never less than what the process had before its exec,
    which is the memory of whoever started it."""
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return int(line) * 1024


if __name__ == "__main__":
    main()
