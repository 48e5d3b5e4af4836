"""One torchrun of a run: what it was told, what it leaves, and which processes belong to it."""

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.living import is_alive

ROOT = Path(__file__).parents[2]
MARK = "CHAOS_START"
"""An environment variable that all processes of a start inherit."""
RANKS = 2
STEP_LINE = re.compile(r"^\S+ \S+ step \d+/", re.MULTILINE)
ENGINE_DIED = re.compile(r"WARNING: (engine \d+ on rank \d+ died: .*)")


class Start:
    """From torchrun's first moment until nothing of it is left."""

    def __init__(
        self, run_dir: Path, options: Sequence[str], max_restarts: int, output: Path
    ) -> None:
        self.run_dir = run_dir
        self._logs = [run_dir / f"log/rank{rank}.txt" for rank in range(RANKS)]
        self._old = [_size(path) for path in self._logs]
        self._output = output
        self._mark = uuid.uuid4().hex
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={RANKS}", f"--max-restarts={max_restarts}"),
            *("-m", "megatron_eopd.train", "examples/quickstart/eopd.toml"),
            *(f"run_dir={run_dir}", *options),
        ]
        with output.open("w") as file:
            self.torchrun = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", MARK: self._mark},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.began = time.time()
        self.arm()

    def arm(self) -> None:
        """What is new is what comes from here on."""
        self._armed_at = time.time()
        self._armed_log = len(self.log())

    def has_ended(self) -> bool:
        return self.torchrun.poll() is not None

    def log(self, rank: int = 0) -> str:
        """Of this start alone."""
        with suppress(FileNotFoundError), self._logs[rank].open("rb") as file:
            file.seek(self._old[rank])
            return file.read().decode(errors="replace")
        return ""

    def new_log(self) -> str:
        return self.log()[self._armed_log :]

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def has_reported(self) -> bool:
        """The last thing that a run does."""
        return "\n- Hugging Face export: " in self.output()

    def count_steps(self) -> int:
        """Iterations that it has told of."""
        return len(STEP_LINE.findall(self.log()))

    def has_new_step(self, behind: str = "") -> bool:
        """Behind the first place of the log that has these words."""
        said = self.new_log()
        return STEP_LINE.search(said.partition(behind)[2] if behind else said) is not None

    def is_back(self) -> bool:
        """Brought back by torchrun."""
        return "starts: at iteration" in self.new_log()

    def has_written(self, checkpoint: Path) -> bool:
        """Or removed."""
        done = checkpoint / "DONE"
        return not done.is_file() or done.stat().st_mtime > self.began

    def is_saving(self) -> bool:
        return any(
            self._is_new(path) and not (path / "DONE").exists()
            for path in self.run_dir.glob("checkpoints/*")
        )

    def is_exporting(self) -> bool:
        return any(self._is_new(path) for path in self.run_dir.glob("hf*"))

    def _is_new(self, path: Path) -> bool:
        with suppress(FileNotFoundError):
            return path.is_dir() and path.stat().st_mtime > self._armed_at
        return False

    def processes(self) -> list[psutil.Process]:
        """All that live, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and is_alive(process):
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Raise NoSuchProcess where there are none yet, or no more."""
        children = psutil.Process(self.torchrun.pid).children()
        found = [child for child in children if "RANK" in child.environ()]
        if not found:
            raise psutil.NoSuchProcess(self.torchrun.pid)
        return found

    def engines(self) -> list[psutil.Process]:
        """Raise NoSuchProcess where there are none yet, or no more."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if "megatron_eopd.rollout.vllm_child" in process.cmdline():
                    found.append(process)
        if not found:
            raise psutil.NoSuchProcess(self.torchrun.pid)
        return found

    def told_death(self) -> str:
        """What the ranks said of an engine's, since the start was armed; empty if nothing."""
        found = ENGINE_DIED.search(self.new_log())
        return found[1] if found else ""

    def left_after(self, seconds: float) -> list[psutil.Process]:
        """Processes that outlive torchrun for so long."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def kill(self) -> None:
        self.torchrun.kill()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.torchrun.wait()

    def said(self) -> str:
        """What the ranks said of an error, or of a stop, first; empty if nothing."""
        lines = sorted(line for rank in range(RANKS) for line in self.log(rank).splitlines())
        texts = [line.split(" ", 2)[-1] for line in lines]
        texts += self.output().splitlines()
        for wanted in (r"(?i)error\b", r"stopped (in|before|after|by)\b", r"SIG\w+:"):
            if found := [text for text in texts if re.match(wanted, text)]:
                return found[0]
        return ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
