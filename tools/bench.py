"""Benchmarks for the device at hand: the loss, the weight sync, a training iteration.

Prints one table and writes JSON. Every figure stands beside a plain memory copy measured in the
same run, because absolute times of a shared machine say little.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_eopd.config import RolloutConfig, WeightSyncConfig
from megatron_eopd.losses import dense_kl_terms, vocab_parallel_kl_terms
from megatron_eopd.metrics import read_metrics
from megatron_eopd.parallel.init import free_port
from megatron_eopd.rollout.vllm_engine import VllmEngine
from megatron_eopd.weight_sync.manifest import Manifest, TensorSpec

EXAMPLES = """examples:
  python tools/bench.py                        everything, a few minutes
  python tools/bench.py --only loss            one of loss, sync, step
  python tools/bench.py --output bench.json    where the JSON goes
"""
QUICKSTART = "examples/quickstart/eopd.toml"


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    run()  # the first call pays for page faults and caches
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def copy_gb_per_s(num_bytes: int) -> float:
    """Read + write bandwidth of a plain copy of so many bytes."""
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_seconds(lambda: target.copy_(source)) / 1e9


def bench_loss(num_tokens: int = 512, vocab: int = 151_936) -> dict[str, Any]:
    """Reverse KL + forward KL with gradient, float32, vocabulary whole; ours against autograd."""
    student = torch.randn(num_tokens, vocab, requires_grad=True)
    teacher = torch.randn(num_tokens, vocab)

    def run(terms_of: Callable) -> None:
        student.grad = None
        terms = terms_of(student, teacher)
        (terms.reverse_kl + terms.forward_kl).sum().backward()

    ours = median_seconds(lambda: run(vocab_parallel_kl_terms), repeats=3)
    autograd = median_seconds(lambda: run(dense_kl_terms), repeats=3)
    # 20 bytes a pair: two float32 logits read forward and backward, one gradient written.
    gb_per_s = 20 * num_tokens * vocab / ours / 1e9
    return {
        "shape": f"N = {num_tokens}, V = {vocab:,}, float32, TP 1",
        "seconds": ours,
        "autograd of the dense formula, seconds": autograd,
        "speed-up": autograd / ours,
        "GB/s at 20 B per pair": gb_per_s,
        "copy GB/s": copy_gb_per_s(student.numel() * 4),
    }


def in_buckets(tensors: dict[str, torch.Tensor], bucket_mib: float) -> list[list[tuple]]:
    buckets, room = [], 0.0
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            buckets.append([])
            room = bucket_mib * 2**20
        buckets[-1].append((name, tensor))
        room -= tensor.nbytes
    return buckets


def bench_sync(bucket_mib: float = 32.0) -> dict[str, Any]:
    """Weights of a 58-million-parameter Qwen3 into a real vLLM engine over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(
            vocab_size=32_000,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=256,
        )
        model = Qwen3ForCausalLM(config).float()
        model.save_pretrained(folder)
        buckets = in_buckets(model.state_dict(), bucket_mib)
        specs = [
            tuple(TensorSpec(n, "float32", tuple(t.shape)) for n, t in bucket) for bucket in buckets
        ]
        manifest = Manifest((tuple(specs),))
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
        )
        engine = VllmEngine(
            model_path=Path(folder),
            dtype="float32",
            seed=1,
            max_model_len=128,
            rollout=RolloutConfig(kv_cache_gib=0.0625),
            weight_sync=WeightSyncConfig(),
            manifest=manifest,
            stage_leader=0,
            export_buckets=lambda: ([t for _, t in bucket] for bucket in buckets),
            cpu_group=dist.group.WORLD,
            log_path=Path(folder) / "engine.txt",
        )
        try:
            reports = [engine.update_weights(version) for version in range(4)]
        finally:
            engine.close()
            dist.destroy_process_group()
    seconds = statistics.median(r.seconds for r in reports[1:])
    copy = copy_gb_per_s(manifest.num_bytes) / 2
    return {
        "bytes": manifest.num_bytes,
        "buckets": f"{len(buckets)} of up to {bucket_mib:.0f} MiB",
        "seconds": seconds,
        "sync GB/s": manifest.num_bytes / seconds / 1e9,
        "copy GB/s (bytes copied, not read + write)": copy,
    }


def bench_step(iterations: int = 12) -> dict[str, Any]:
    """Iterations of the quick start: median seconds of each stage, the first two left out."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node=2", "-m", "megatron_eopd.train", QUICKSTART),
                *(f"run_dir={run_dir}", f"training.train_iters={iterations}"),
                *("evaluation.task=none", "checkpoint.export_hf=false"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = [r for r in read_metrics(run_dir / "metrics.jsonl") if "time/total" in r][2:]
    names = sorted({n for n in rows[0] if n.startswith("time/")} | {"throughput/tokens_per_s"})
    return {name: statistics.median(row[name] for row in rows) for name in names}


BENCHMARKS = {"loss": bench_loss, "sync": bench_sync, "step": bench_step}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=BENCHMARKS, help="one benchmark instead of all")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"), help="JSON file")
    arguments = parser.parse_args()
    chosen = [arguments.only] if arguments.only else list(BENCHMARKS)
    results = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s) per process, "
        f"torch {torch.__version__}"
    }
    for name in tqdm(chosen, unit="benchmark"):
        results[name] = BENCHMARKS[name]()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"| benchmark | figure | value |  ({results['machine']})\n|---|---|---|")
    for name in chosen:
        for figure, value in results[name].items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"| {name} | {figure} | {shown} |")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
