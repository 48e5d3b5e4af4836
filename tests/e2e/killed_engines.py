"""A training whose engines are killed on the way: in a call for samples, while weights are handed
over, and while they start again.

usage: torchrun … killed_engines.py CONFIG.toml section.key=value …
"""

import os
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from megatron_eopd import launch, loop
from megatron_eopd.cli import run_command
from megatron_eopd.config import load_config
from megatron_eopd.rollout.drawing import Drawing
from megatron_eopd.rollout.fleet import MustLeave
from megatron_eopd.rollout.weights import WeightLoading


def kill_engine(number: int) -> None:
    """Of all that this torchrun's ranks own; in the order of the ranks."""
    owners = sorted(
        psutil.Process(os.getppid()).children(), key=lambda rank: int(rank.environ()["RANK"])
    )
    found = [child for owner in owners for child in owner.children() if _is_engine(child)]
    with suppress(ProcessLookupError):
        os.killpg(found[number % len(found)].pid, signal.SIGKILL)
    print(f"killed engine {number % len(found)}", flush=True)


def _is_engine(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # one that has just been killed
        return "megatron_eopd.rollout.vllm_child" in process.cmdline()
    return False


calls, syncs = 0, 0
go_on, post, begin = Drawing.go_on, WeightLoading.post, WeightLoading.begin


def go_on_and_kill(drawing: Drawing) -> bool:
    global calls
    calls += 1
    take, seen = drawing._take, []

    def take_and_kill(sample) -> None:
        take(sample)
        seen.append(sample)
        if len(seen) == 5 and number in (2, 4):
            kill_engine(1)

    number, drawing._take = calls, take_and_kill
    return go_on(drawing)


def begin_and_kill(loading: WeightLoading, must_leave: MustLeave) -> list[int]:
    """One that is starting again dies once more before anybody needs it."""
    if calls == 4:
        kill_engine(1)
    return begin(loading, must_leave)


def post_and_kill(loading: WeightLoading, students) -> None:
    global syncs
    syncs += 1
    post(loading, students)
    if syncs == 4:
        kill_engine(0)


if __name__ == "__main__":
    Drawing.go_on = go_on_and_kill
    WeightLoading.begin, WeightLoading.post = begin_and_kill, post_and_kill
    train = partial(launch.on_every_rank, work=loop.train)
    sys.exit(run_command(lambda: load_config(Path(sys.argv[1]), sys.argv[2:]), train))
