"""Benchmarks: loss, LM heads, weight sync and rollouts, an iteration, saves, checkpoint conversion.

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
from bench_checkpoint import bench_checkpoint
from bench_convert import bench_convert
from bench_head import bench_head
from bench_loss import add_options, bench_loss, markdown
from bench_rollout import bench_rollout
from tqdm import tqdm

from megatron_eopd.metrics.rows import read_metrics

EXAMPLES = """examples:
  python benchmarks/bench.py                        everything
  python benchmarks/bench.py --only rollout         one of loss, head, rollout, step, checkpoint,
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


BENCHMARKS = ("loss", "head", "rollout", "step", "checkpoint", "convert")


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
    run |= {
        "rollout": lambda: bench_rollout(copy_gb_per_s(232 * 10**6) / 2),
        "step": bench_step,
        "convert": bench_convert,
    }
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
