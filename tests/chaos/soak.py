"""One long run whose engines are killed again and again: is anything left behind by that?

In: how many iterations, and how often one of the engines dies. Out: a table of memory, open files
and threads of every rank, and whether metrics and rollouts are those of a run that
nothing disturbs.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from tqdm import tqdm

from megatron_eopd.metrics.rows import read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLES = """examples:
  python -m tests.chaos.soak                                200 iterations, a death every 25
  python -m tests.chaos.soak --iterations 40 --every 10     a short one
"""
CLOCKED = re.compile(r"time/|throughput/tokens_per_s|memory/|engine/|weight_sync/.*s$")


def start(run_dir: Path, arguments: argparse.Namespace) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "megatron_eopd.train", "examples/quickstart/eopd.toml", f"run_dir={run_dir}"),
            *("rollout.batch_size=128", "rollout.samples_per_prompt=4", "rollout.record=true"),
            *(f"training.train_iters={arguments.iterations}", "checkpoint.export_hf=false"),
            *(f"rollout.num_engines={arguments.engines}", "evaluation.tasks=none"),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def iterations_done(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"loss/total") if metrics.is_file() else 0


def ranks_of(job: subprocess.Popen) -> list[psutil.Process]:
    ranks = psutil.Process(job.pid).children()
    return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))


def engines_of(job: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for rank in ranks_of(job):
        for child in rank.children():
            with suppress(psutil.Error):
                if "megatron_eopd.rollout.vllm_child" in child.cmdline():
                    found.append(child)
    return found


def gauges(job: subprocess.Popen) -> str:
    """Of each rank: MiB of its own memory, file descriptors, threads."""
    return " | ".join(
        f"{rank.memory_full_info().uss / 2**20:.0f} MiB, {rank.num_fds()}, {rank.num_threads()}"
        for rank in ranks_of(job)
    )


def watch(run_dir: Path, arguments: argparse.Namespace, *, kills_some: bool) -> dict[int, str]:
    """A whole run; its gauges by iterations. Engines are killed in turns, or none is."""
    job, rows, kills, seen = start(run_dir, arguments), {}, 0, 0
    with tqdm(total=arguments.iterations, unit="iter") as bar:
        while job.poll() is None:
            done = iterations_done(run_dir)
            bar.update(done - bar.n)
            if done >= seen + arguments.every and done < arguments.iterations:
                seen = done - done % arguments.every
                with suppress(psutil.Error):
                    rows[seen] = gauges(job)
                engines = engines_of(job) if kills_some else []
                if engines:
                    os.killpg(engines[kills % len(engines)].pid, signal.SIGKILL)
                    kills += 1
            time.sleep(0.05)
    assert job.returncode == 0, job.stderr.read()
    return rows


def timeless(run_dir: Path) -> list[dict]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not CLOCKED.match(k)} for row in rows]


def same(run_dir: Path, other: Path) -> bool:
    names = [path.name for path in sorted((other / "rollouts").iterdir())]
    files = (((d / "rollouts" / name).read_bytes() for d in (run_dir, other)) for name in names)
    return timeless(run_dir) == timeless(other) and all(a == b for a, b in files)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--every", type=int, default=25, help="iterations between two deaths")
    parser.add_argument("--engines", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        before = watch(straight, arguments, kills_some=False)
        after = watch(killed, arguments, kills_some=True)
        last = read_metrics(killed / "metrics.jsonl")[-1]
        total = sum(v for k, v in last.items() if re.fullmatch(r"engine/\d+/restarts", k))
        print("| iterations | undisturbed: rank 0 | rank 1 | with deaths: rank 0 | rank 1 |")
        print("|---|---|---|---|---|")
        for seen in sorted(before.keys() & after.keys()):
            print(f"| {seen} | {before[seen]} | {after[seen]} |")
        print(f"\nRestarts: {total:.0f}. The same to the bit: {same(killed, straight)}.")


if __name__ == "__main__":
    main()
