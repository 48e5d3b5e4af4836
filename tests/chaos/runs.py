"""The toy runs that faults meet: their options, how they end undisturbed, and where they lie."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.chaos.start import Start
from tests.e2e.jobs import repeat_recorded

DISK_MIB = 64
UNDISTURBED_S = 400.0
_COMMON = (
    *("rollout.batch_size=32", "training.global_batch_size=16", "training.micro_batch_size=4"),
    *("training.lr_warmup_steps=0", "evaluation.tasks=none", "checkpoint.save_interval=1"),
    # A held rank is to be missed soon, by those that train and by those that write.
    *("parallel.distributed_timeout_minutes=0.5", "checkpoint.save_timeout_minutes=0.5"),
)
# How long ranks wait for engines.
_LONGEST_WAITS = {
    "rollout.start_timeout_s": 100,
    "rollout.generate_timeout_s": 100,
    "rollout.engine_timeout_s": 15,
    "weight_sync.timeout_s": 20,
}
_MAX_RESTARTS = 20
"""More than a run has faults: no death of an engine may end it."""


@dataclass(frozen=True)
class Kind:
    """Runs that differ in nothing but where they lie."""

    folder: Path
    num_engines: int
    """0: rollouts are replayed."""
    iterations: int

    @property
    def options(self) -> list[str]:
        recorded = "none" if self.num_engines else self._recorded()
        waits = [f"{name}={s if self.num_engines else 1}" for name, s in _LONGEST_WAITS.items()]
        own = [f"training.train_iters={self.iterations}", f"rollout.replay={recorded}"]
        engines = [f"rollout.num_engines={self.num_engines or 1}"]
        return [*_COMMON, *waits, *own, *engines, f"rollout.max_restarts={_MAX_RESTARTS}"]

    def _recorded(self) -> Path:
        folder = self.folder / "recorded"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            repeat_recorded(folder, self.iterations)
        return folder

    def undisturbed(self) -> Path:
        """The run that nothing happens to, made once: one engine draws what two do."""
        run_dir = self.folder / ("undisturbed-engine" if self.num_engines else "undisturbed")
        if not run_dir.is_dir():
            options = replace(self, num_engines=min(self.num_engines, 1)).options
            start = Start(run_dir, options, 0, run_dir.with_suffix(".txt"))
            try:
                start.torchrun.wait(UNDISTURBED_S)
                assert start.torchrun.returncode == 0, start.output()
            finally:
                start.kill()
        return run_dir


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """The directory, as a file system of its own if that may be mounted: one that can be filled."""
    directory.mkdir(parents=True)
    is_mounted = mount(directory)
    try:
        yield directory
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=False)


def mount(directory: Path) -> bool:
    """Whether it was allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(directory)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def can_mount(folder: Path) -> bool:
    with small_disk(folder / "try") as directory:
        return directory.is_mount()
