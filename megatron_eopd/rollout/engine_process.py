"""The trainer's handle on the engine process. In: requests. Out: replies, some in parts, or errors.

Every wait has a deadline and sees the death of the process at once; the error names the engine,
how it ended, what it was doing, and the last lines of its log.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from megatron_eopd.errors import EngineError, Interrupted
from megatron_eopd.rollout.messages import Reply, Request

CHILD_MODULE = "megatron_eopd.rollout.vllm_child"
LOG_TAIL_LINES = 20
TELL_INTERVAL_S = 5.0
LINE_WIDTH = 100
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


class EngineProcess:
    def __init__(self, name: str, log_path: Path, environment: dict[str, str]):
        """Start the process; `environment` is added to a copy of this one's.

        Call it on the main thread: the process is killed when the thread that started it ends.
        """
        self._name = name
        self._log_path = log_path
        self._doing = "starting"
        self._killed = False
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", CHILD_MODULE]
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [*command, "--pipe", str(theirs.fileno()), "--parent", str(os.getpid())],
                env=_clean_environment() | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                # A group of its own: Ctrl-C is the trainer's to handle, and `kill` takes vLLM's
                # workers along.
                start_new_session=True,
            )
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(
        self,
        verb: str,
        *,
        doing: str,
        wait_s: float,
        must_leave: Callable[[], str | None] | None = None,
        take_part: Callable[[Any], None] | None = None,
        **arguments: Any,
    ) -> Any:
        """Post a request and wait for its answer.

        Raises:
            EngineError: the process died, refused, or did not answer in time.
            Interrupted: see `answer`.
        """
        self.post(verb, doing=doing, **arguments)
        return self.answer(wait_s, must_leave=must_leave, take_part=take_part)

    def post(self, verb: str, *, doing: str, **arguments: Any) -> None:
        if self._process.poll() is not None:
            raise self._death()
        self._doing = doing
        try:
            self._connection.send(Request(verb, arguments))
        except OSError:
            raise self._death() from None

    def answer(
        self,
        wait_s: float,
        tell: Callable[[str], None] | None = None,
        must_leave: Callable[[], str | None] | None = None,
        take_part: Callable[[Any], None] | None = None,
    ) -> Any:
        """The reply to the request posted last; `take_part` gets the parts of it that come before.
        `tell` hears every few seconds what the process wrote last.

        The process is killed when nobody waits for it any longer, as whatever it does next would
        answer a question that nobody asks: when `wait_s` are over, parts or none, when `must_leave`
        says why the wait must end, and when `take_part` raises.

        Raises:
            EngineError: as `ask` does.
            Interrupted: `must_leave` said so.
            Exception: what `take_part` raised.
        """
        begin = told = time.monotonic()
        while True:
            if self._connection.poll(0.05):
                reply = self._receive()
                if not reply.is_part:
                    return reply.value
                self._hand_on(reply.value, take_part)
            elif self._process.poll() is not None and not self._connection.poll():
                raise self._death()
            if tell is not None and time.monotonic() - told > TELL_INTERVAL_S:
                told = time.monotonic()
                tell(f"{self._name} {self._doing}, {told - begin:.0f} s: {self._last_line()}")
            self._leave_in_time(begin, wait_s, must_leave)

    def _receive(self) -> Reply:
        try:
            reply: Reply = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if reply.error is not None:
            raise EngineError(
                f"{self._name} failed while {self._doing}: {reply.error}\n{self._log_tail()}"
            )
        return reply

    def _hand_on(self, part: Any, take_part: Callable[[Any], None] | None) -> None:
        assert take_part is not None, f"{self._name} sent a part of an answer while {self._doing}"
        try:
            take_part(part)
        except BaseException:
            self.kill()
            raise

    def _leave_in_time(
        self, begin: float, wait_s: float, must_leave: Callable[[], str | None] | None
    ) -> None:
        if must_leave is not None and (reason := must_leave()) is not None:
            self.kill()
            raise Interrupted(f"stopped by {reason} while {self._name} was {self._doing}")
        if time.monotonic() - begin > wait_s:
            self.kill()
            raise EngineError(
                f"{self._name} gave no answer within {wait_s:.0f} s while {self._doing}, "
                f"and was killed.\n{self._log_tail()}"
            )

    def close(self) -> None:
        """Let it exit, or make it. Safe to call twice, and on a dead process."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._connection.send(Request("exit", {}))
                self._process.wait(timeout=10)
        self.kill()
        self._connection.close()

    def kill(self) -> None:
        """The process and vLLM's workers, once: later the number may be another group's."""
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _death(self) -> EngineError:
        # The pipe closes a moment before the process is gone.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self.kill()
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return EngineError(f"{self._name} died while {self._doing}: {how}.\n{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self._log_lines()[-LOG_TAIL_LINES:]
        return f"Last lines of {self._log_path}:\n" + "\n".join(f"  {line}" for line in lines)

    def _last_line(self) -> str:
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
        if name not in TORCHRUN_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    package_root = str(Path(__file__).resolve().parents[2])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, kept.get("PYTHONPATH")]))
    return kept
