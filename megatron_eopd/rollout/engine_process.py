"""The owner's handle on an engine's process. In: requests. Out: what came back, or how it ended.

Nothing here waits for an answer: whoever asks looks again, and kills what is silent for too long.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path

from megatron_eopd.errors import EngineError
from megatron_eopd.rollout.messages import Reply, Request

CHILD_MODULE = "megatron_eopd.rollout.vllm_child"
LOG_TAIL_LINES = 20
LINE_WIDTH = 100
EXIT_S, HUNG_UP_S, KILLED_S = 10.0, 5.0, 60.0
"""Waits for a process that was asked to exit, that has closed its pipe, that was killed."""
# Set by torchrun for the trainer's ranks; an engine that sees them joins the wrong job.
TORCHRUN_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# For the trainer, whose transfers are to start in the order of its calls. It leaves one queue for
# all streams of a process, where vLLM overlaps copies, sampling and transfers on several.
TRAINERS_VARIABLES = ("CUDA_DEVICE_MAX_CONNECTIONS",)


class EngineProcess:
    def __init__(self, log_path: Path, environment: Mapping[str, str]) -> None:
        """Start the process; `environment` is added to a copy of this one's.

        Call it on the main thread: the process is killed when the thread that started it ends.
        """
        self._log_path = log_path
        self._killed = False
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", CHILD_MODULE]
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [*command, "--pipe", str(theirs.fileno()), "--parent", str(os.getpid())],
                env=_clean_environment() | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                # A group of its own: Ctrl-C is the trainer's to handle, and `kill` takes vLLM's
                # workers along.
                start_new_session=True,
            )
        theirs.close()
        # On threads: a process that is held, not dead, neither takes nor finishes a message, and
        # who owns it must not wait for it.
        self._outgoing: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._hung_up = False
        self._threads = [
            threading.Thread(target=work, name="engine-pipe", daemon=True)
            for work in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def post(self, request: Request) -> None:
        """To a process that has ended, nothing: `death` says so."""
        self._outgoing.put(request)

    def replies(self, wait_s: float) -> list[Reply]:
        """All that came; waits so long for the first."""
        found: list[Reply] = []
        with contextlib.suppress(queue.Empty):
            while True:
                reply = self._incoming.get(timeout=0 if found else wait_s)
                if reply is None:
                    self._hung_up = True
                    break
                found.append(reply)
        return found

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while (request := self._outgoing.get()) is not None:
                self._connection.send(request)

    def _receive(self) -> None:
        try:
            while True:
                self._incoming.put(self._connection.recv())
        except Exception:  # the end, or what nobody can read: either way nothing more comes
            self._incoming.put(None)

    def death(self) -> str | None:
        """How it ended, with the last lines of its log; None while it runs. Look for replies
        first: they may have come before."""
        if self._process.poll() is None:
            if not self._hung_up:
                return None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=HUNG_UP_S)
        self.kill()  # with it what is left of vLLM's workers
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how}.\n{self.log_tail()}"

    def close(self) -> None:
        """Let it exit, or make it. Safe to call twice, and on a dead process."""
        if self._process.poll() is None:
            self.post(Request(0, "exit"))
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=EXIT_S)
        self.kill()

    def kill(self) -> None:
        """The process and vLLM's workers, once: later the number may be another group's."""
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            try:
                self._process.wait(timeout=KILLED_S)
            except subprocess.TimeoutExpired:
                raise EngineError(
                    f"the engine's process {self._process.pid} did not end within {KILLED_S:g} s "
                    f"of SIGKILL: its GPU or a file system hangs. See to the host, and start the "
                    f"same command again."
                ) from None
            self._outgoing.put(None)
            for thread in self._threads:  # both see the end of the pipe
                thread.join(HUNG_UP_S)
            self._connection.close()

    def log_tail(self) -> str:
        lines = self._log_lines()[-LOG_TAIL_LINES:]
        return f"Last lines of {self._log_path}:\n" + "\n".join(f"  {line}" for line in lines)

    def last_line(self) -> str:
        lines = [line.strip() for line in self._log_lines() if line.strip()]
        return lines[-1][:LINE_WIDTH] if lines else "nothing in its log yet"

    def _log_lines(self) -> list[str]:
        with self._log_path.open("rb") as log:
            log.seek(max(self._log_start, self._log_path.stat().st_size - 16384))
            return log.read().decode(errors="replace").splitlines()


def _clean_environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*TORCHRUN_VARIABLES, *TRAINERS_VARIABLES)
        and not name.startswith("TORCHELASTIC_")
    }
    package_root = str(Path(__file__).resolve().parents[2])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, kept.get("PYTHONPATH")]))
    return kept
