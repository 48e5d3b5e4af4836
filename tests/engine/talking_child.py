"""An engine process without an engine, which answers in parts."""

import itertools
import os
import signal
import time
from collections.abc import Iterator

from megatron_eopd.rollout import vllm_child


class Talker:
    """In the place of vLLM's Server."""

    def count(self, to: int) -> Iterator[int]:
        yield from range(to)

    def whole(self) -> str:
        return "whole"

    def count_and_fail(self) -> Iterator[int]:
        yield from range(3)
        raise ValueError("no more numbers")

    def count_and_die(self) -> Iterator[int]:
        yield from range(3)
        os.kill(os.getpid(), signal.SIGKILL)

    def count_for_ever(self) -> Iterator[int]:
        for number in itertools.count():
            yield number
            time.sleep(0.01)  # less than the trainer waits for a word


if __name__ == "__main__":
    vllm_child.Server = Talker
    vllm_child.main()
