"""An engine process without an engine, whose answers a test chooses."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator

from megatron_eopd.rollout import vllm_child


class Talker:
    """In the place of vLLM's Server."""

    def __init__(self) -> None:
        self._next, self._to, self._then = 0, 0, "rest"
        self.has_lost_a_worker = False

    def lose_a_worker(self) -> None:
        """From now on all that it is asked fails."""
        self.has_lost_a_worker = True
        raise AssertionError("no worker answers")

    def add(self, to: int, then: str = "rest") -> None:
        """Count, a number with every step; behind the last one `rest`, `fail` or `die`."""
        self._next, self._to, self._then = 0, to, then

    @property
    def is_busy(self) -> bool:
        return self._next < self._to

    def step(self) -> Iterator[int]:
        yield self._next
        self._next += 1
        if self._next == self._to and self._then == "fail":
            raise ValueError("no more numbers")
        if self._next == self._to and self._then == "die":
            os.kill(os.getpid(), signal.SIGKILL)

    def whole(self) -> str:
        return "whole"

    def size_of(self, data: bytes) -> int:
        return len(data)

    def refuse(self, reason: str) -> None:
        raise ValueError(reason)

    def say(self, lines: list[str]) -> None:
        print(*lines, sep="\n", flush=True)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def start_worker(self) -> int:
        """A process that knows nothing of its parent, as some of vLLM's do not."""
        return subprocess.Popen(["sleep", "60"]).pid


if __name__ == "__main__":
    vllm_child.main(Talker())
