"""Benchmarks: the loss, the LM heads, the weight sync, an iteration, saves, checkpoint conversion.

Prints tables and writes JSON. Every figure stands beside a plain memory copy measured in the
same run, because absolute times of a shared machine say little.
"""

import argparse
import json
import os
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
from bench_checkpoint import bench_checkpoint
from bench_convert import bench_convert
from bench_head import bench_head
from bench_loss import add_options, bench_loss, markdown
from tqdm import tqdm

from megatron_eopd.metrics.writer import read_metrics

EXAMPLES = """examples:
  python benchmarks/bench.py                        everything
  python benchmarks/bench.py --only sync            one of loss, head, sync, step, checkpoint,
                                                    convert
  python benchmarks/bench.py --output bench.json    where the JSON goes
  python benchmarks/bench.py --only loss --cases float32 tp2 --contenders ours modelopt
  python benchmarks/bench.py --only loss --cases plot --plot docs/images/loss_bench.png
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
    # Seconds of imports that the other benchmarks do without.
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_eopd.config import RolloutConfig, WeightSyncConfig
    from megatron_eopd.parallel.init import free_port
    from megatron_eopd.rollout.vllm_engine import VllmEngine, launch_vllm
    from megatron_eopd.weight_sync.manifest import Manifest, TensorSpec

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
        rollout = RolloutConfig(kv_cache_gib=0.0625)
        process = launch_vllm(
            model_path=Path(folder),
            dtype="float32",
            seed=1,
            max_model_len=128,
            hf_overrides={},
            rollout=rollout,
            log_path=Path(folder) / "engine.txt",
        )
        engine = VllmEngine(
            process,
            max_model_len=128,
            rollout=rollout,
            weight_sync=WeightSyncConfig(),
            manifest=manifest,
            stage_leader=0,
            export_buckets=lambda: ([t for _, t in bucket] for bucket in buckets),
            cpu_group=dist.group.WORLD,
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
                *("evaluation.tasks=none", "checkpoint.export_hf=false"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = [r for r in read_metrics(run_dir / "metrics.jsonl") if "time/total" in r][2:]
    names = sorted({n for n in rows[0] if n.startswith("time/")} | {"throughput/tokens_per_s"})
    return {name: statistics.median(row[name] for row in rows) for name in names}


def figures_table(name: str, figures: dict[str, Any]) -> str:
    lines = ["| benchmark | figure | value |", "|---|---|---|"]
    for figure, value in figures.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        lines.append(f"| {name} | {figure} | {shown} |")
    return "\n".join(lines)


BENCHMARKS = ("loss", "head", "sync", "step", "checkpoint", "convert")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=BENCHMARKS, help="one benchmark instead of all")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"), help="JSON file")
    add_options(parser)
    arguments = parser.parse_args()
    chosen = [arguments.only] if arguments.only else BENCHMARKS
    run = {"loss": lambda: bench_loss(arguments), "head": bench_head}
    run |= {"sync": bench_sync, "step": bench_step, "convert": bench_convert}
    run["checkpoint"] = bench_checkpoint
    # Where fresh memory comes in small pages, whoever allocates most pays most.
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    results = {"device": device(), "torch": torch.__version__, "GLIBC_TUNABLES": tunables}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in tqdm(chosen, unit="benchmark"):
        results[name] = run[name]()
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
        table = markdown(results[name]) if name == "loss" else figures_table(name, results[name])
        tqdm.write(f"{table}\n")
    about = f"{results['device']}, torch {results['torch']}, GLIBC_TUNABLES={tunables or 'unset'}"
    print(f"{about}; written to {arguments.output}")


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"


if __name__ == "__main__":
    main()
