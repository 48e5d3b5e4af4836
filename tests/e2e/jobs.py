"""A job of the quick start on recorded rollouts, as tests start it and look after its processes."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.living import is_alive

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests/distributed/recorded/000000.jsonl"
SEPARATE = [
    "teacher.placement=separate",
    "teacher.world_size=1",
    "teacher.parallel.tensor_model_parallel_size=1",
]


def repeat_recorded(folder: Path, iterations: int) -> Path:
    """The same rollouts for every iteration."""
    for iteration in range(iterations):
        shutil.copy(RECORDED, folder / f"{iteration:06d}.jsonl")
    return folder


class Job:
    """A torchrun, and all that it brings about."""

    def __init__(self, torchrun: subprocess.Popen, run_dir: Path) -> None:
        self.torchrun = torchrun
        self.run_dir = run_dir
        self._seen = {psutil.Process(torchrun.pid)}

    def processes(self) -> list[psutil.Process]:
        """All that live, and were its descendants or theirs when anybody looked."""
        for parent in list(self._seen):
            with suppress(psutil.NoSuchProcess):
                self._seen |= set(parent.children(recursive=True))
        return [p for p in self._seen if is_alive(p)]

    def rank(self, number: int) -> psutil.Process:
        ranks = psutil.Process(self.torchrun.pid).children()
        (found,) = [p for p in ranks if p.environ()["RANK"] == str(number)]
        return found

    def log(self, rank: int = 0) -> str:
        path = self.run_dir / f"log/rank{rank}.txt"
        return path.read_text() if path.is_file() else ""

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.torchrun.poll() is None, self.torchrun.communicate()[1]
            assert time.monotonic() < deadline, self.log()
            self.processes()
            time.sleep(0.05)


@contextmanager
def job(
    run_dir: Path, recorded: Path | str, ranks: int, *overrides: str, max_restarts: int = 0
) -> Iterator[Job]:
    """Whatever is left of it in the end is killed. `recorded`: none for an engine's rollouts."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={ranks}", f"--max-restarts={max_restarts}"),
        *("-m", "megatron_eopd.train", "examples/quickstart/eopd.toml"),
        *(f"run_dir={run_dir}", f"rollout.replay={recorded}"),
        *("rollout.batch_size=32", "training.global_batch_size=16", "training.micro_batch_size=4"),
        *("evaluation.tasks=none", "checkpoint.export_hf=false", "training.lr_warmup_steps=0"),
        *overrides,
    ]
    torchrun = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = Job(torchrun, run_dir)
    try:
        yield started
    finally:
        for process in started.processes():
            process.kill()
        torchrun.communicate()
