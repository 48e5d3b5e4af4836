"""Memory and time of the LM heads and the loss together, materialized against chunked.

Each head runs in a process of its own, whose peak memory is then its own; bench.py --only head
prints both. Random hidden states and LM heads stand for the models.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses import vocab_parallel_kl_terms
from megatron_eopd.losses.chunked_head import chunked_head_loss

HEADS = ("materialized", "chunked")
CHUNK_SIZE = 256
THRESHOLD = ObjectiveConfig().entropy_threshold


def bench_head(num_tokens: int = 2048, vocab: int = 151_936) -> dict[str, Any]:
    """Reverse KL + gated forward KL from hidden states to the gradients of hidden states and of
    the LM head, float32, student hidden size 64, teacher 128, TP 1."""
    results, gradients = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for head in HEADS:
            file = Path(folder) / f"{head}.pt"
            command = [sys.executable, __file__, head, str(num_tokens), str(vocab), str(file)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[head] = json.loads(done.stdout)
            gradients[head] = torch.load(file)
    whole, chunked = (results[head] for head in HEADS)
    difference = max(
        ((a - b).abs().max() / a.abs().max()).item()
        for a, b in zip(*(gradients[head] for head in HEADS), strict=True)
    )
    return {
        "shape": f"N = {num_tokens:,}, V = {vocab:,}, H = 64 / 128, float32, TP 1",
        "materialized: peak of the process, MB": whole["peak"] / 1e6,
        "chunked: peak of the process, MB": chunked["peak"] / 1e6,
        "peak ratio": whole["peak"] / chunked["peak"],
        "materialized: seconds": whole["seconds"],
        "chunked: seconds": chunked["seconds"],
        "largest relative difference of loss and gradients": difference,
    }


def run_head(head: str, num_tokens: int, vocab: int) -> tuple[list[torch.Tensor], float]:
    """(loss, gradient of the hidden states, gradient of the weight), seconds."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 64).requires_grad_()
    weight = (torch.randn(vocab, 64) / 8).requires_grad_()
    teacher_hidden, teacher_weight = torch.randn(num_tokens, 128), torch.randn(vocab, 128) / 8

    def loss_of_rows(logits: torch.Tensor, rows: slice, inplace: bool) -> torch.Tensor:
        terms = vocab_parallel_kl_terms(
            logits, teacher_hidden[rows] @ teacher_weight.T, inplace_backward=inplace
        )
        gate = (terms.teacher_entropy >= THRESHOLD).float()
        return (terms.reverse_kl + gate * terms.forward_kl).sum()

    begin = time.perf_counter()
    if head == "chunked":
        loss = chunked_head_loss(
            hidden,
            weight,
            lambda logits, rows: loss_of_rows(logits, rows, inplace=True),
            chunk_size=CHUNK_SIZE,
            tp_group=dist.group.WORLD,
        )
    else:
        loss = loss_of_rows(hidden @ weight.T, slice(None), inplace=False)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad], time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description="One head, in this process; see bench.py.")
    parser.add_argument("head", choices=HEADS)
    parser.add_argument("num_tokens", type=int)
    parser.add_argument("vocab", type=int)
    parser.add_argument("gradients", type=Path, help="file to write loss and gradients to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=0, world_size=1)
        results, seconds = run_head(arguments.head, arguments.num_tokens, arguments.vocab)
        dist.destroy_process_group()
    peak = peak_bytes()
    torch.save(results, arguments.gradients)
    print(json.dumps({"peak": peak, "seconds": seconds}))


def peak_bytes() -> int:
    """Of this program alone: ru_maxrss is never less than what the process had before its exec,
    which is the memory of whoever started it."""
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return int(line) * 1024


if __name__ == "__main__":
    main()
