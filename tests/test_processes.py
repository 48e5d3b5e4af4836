"""What happens to a process when the one that started it is killed."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_eopd.errors import LostRankError
from megatron_eopd.parallel.meeting import require_torchrun
from tests.living import is_alive, wait_until_gone

ROOT = Path(__file__).parents[1]
FORK = """
import os, sys, threading, time
from megatron_eopd.parallel.processes import forks_die_with_their_parents

def fork():
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)

forks_die_with_their_parents()
"""
# A process that has torchrun's variables, or not, and one that it has started.
RANK = """
import subprocess, sys, time
code = '''
import os, time
from megatron_eopd.parallel.processes import die_with_torchrun
die_with_torchrun()
print(os.getpid(), flush=True)
time.sleep(60)
'''
subprocess.Popen([sys.executable, "-c", code])
time.sleep(60)
"""
# As vLLM does it, from the process that runs it: `-m megatron_eopd.rollout.vllm_child`.
SPAWN = """
import multiprocessing, sys, time
from megatron_eopd.rollout import vllm_child

sys.modules["__main__"].__spec__ = vllm_child.__spec__
code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
multiprocessing.get_context("spawn").Process(target=exec, args=(code,)).start()
time.sleep(60)
"""


@contextmanager
def killed_parent(code: str, **environment: str) -> Iterator[psutil.Process]:
    """The process whose id the code prints, after the one that ran the code was killed."""
    kept = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.pid != parent.pid and is_alive(child)
    parent.kill()
    parent.wait()
    try:
        yield child
    finally:
        if is_alive(child):
            child.kill()


@pytest.mark.parametrize(
    "code,environment",
    [
        pytest.param(FORK + "fork(); time.sleep(60)", {}, id="forked"),
        pytest.param(SPAWN, {}, id="spawned by vLLM"),
        pytest.param(RANK, {"TORCHELASTIC_RUN_ID": "1"}, id="rank of torchrun"),
    ],
)
def test_it_is_killed_too(code, environment):
    with killed_parent(code, **environment) as child:
        wait_until_gone(lambda: [child] if is_alive(child) else [], 2)


def test_a_run_without_torchrun_goes_on_when_its_shell_ends():
    with killed_parent(RANK) as child:
        time.sleep(0.3)
        assert is_alive(child)


def test_what_another_thread_forks_outlives_that_thread():
    """Linux would kill it at the end of the thread."""
    code = """
thread = threading.Thread(target=lambda: (fork(), time.sleep(0.3)))
thread.start()
thread.join()
time.sleep(0.2)
(child,) = __import__("psutil").Process().children()
print(child.status(), flush=True)
child.kill()
"""
    done = subprocess.run(
        [sys.executable, "-c", FORK + code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split()[1] == psutil.STATUS_SLEEPING, done.stderr


def test_a_rank_whose_torchrun_has_ended_says_so(monkeypatch):
    with socket.socket() as taken:  # and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(LostRankError, match=r"torchrun has ended.*Connection refused"):
            require_torchrun()
