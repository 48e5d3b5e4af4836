"""The engine process, its pipe and its end. vLLM is never started in it: a stand-in answers."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_eopd.rollout import engine_process
from megatron_eopd.rollout.engine_process import EngineProcess
from megatron_eopd.rollout.messages import Reply, Request
from tests.living import is_alive, wait_until_gone
from tests.ring_peers import start, try_to_open

REPOSITORY = Path(__file__).parents[1]
NOBODY = 65534
LARGE = b"x" * (4 << 20)
"""More than a socket takes while nobody reads."""
TRAINERS = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "CUDA_DEVICE_MAX_CONNECTIONS",
)


@pytest.fixture(scope="module", autouse=True)
def child_module() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "CHILD_MODULE", "tests.engine.talking_child")
        yield


@pytest.fixture(scope="module")
def talker(tmp_path_factory, child_module) -> Iterator[EngineProcess]:
    """One for all tests that leave it sound. It has seen the trainer's variables, and its log had
    something in it before."""
    log = tmp_path_factory.mktemp("log") / "engine0.txt"
    log.write_text("from an earlier start\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in TRAINERS:
            patch.setenv(name, "1")
        talker = EngineProcess(log, {"TEST_MARK": "here"})
    yield talker
    talker.close()
    assert talker.death().startswith("exit code 0."), "it was asked to exit, and did"
    talker.close()
    talker.kill()


@pytest.fixture
def process(tmp_path) -> Iterator[EngineProcess]:
    process = EngineProcess(tmp_path / "log" / "engine1.txt", {})
    yield process
    process.kill()
    assert not psutil.pid_exists(process.pid)


def replies_until(process: EngineProcess, number: int, seconds: float = 60) -> list[Reply]:
    """All that come before and with the last reply to this request."""
    deadline, found = time.monotonic() + seconds, []
    while not any(reply.number == number and not reply.is_part for reply in found):
        assert time.monotonic() < deadline, f"{number} was not answered: {process.log_tail()}"
        found += process.replies(0.1)
    return found


def ask(process: EngineProcess, number: int, verb: str, **arguments) -> Reply:
    process.post(Request(number, verb, arguments))
    return replies_until(process, number)[-1]


def test_replies_come_in_the_order_of_their_requests(talker):
    for number in range(50, 70):
        talker.post(Request(number, "size_of", {"data": b"x" * number}))
    assert replies_until(talker, 69) == [Reply(number, number) for number in range(50, 70)]


def test_parts_come_in_order_while_other_requests_are_answered(talker):
    """They bear the number of their own request."""
    talker.post(Request(1, "add", {"to": 200}))
    talker.post(Request(2, "whole"))
    replies = replies_until(talker, 2)
    while sum(reply.is_part for reply in replies) < 200:
        replies += talker.replies(5)
    assert [r for r in replies if not r.is_part] == [Reply(1), Reply(2, "whole")]
    parts = [r for r in replies if r.is_part]
    assert parts == [Reply(1, value, is_part=True) for value in range(200)]
    assert replies[0] == Reply(1) and talker.replies(0.05) == []


def test_a_verb_that_fails_answers_and_the_process_goes_on(talker):
    refused = ask(talker, 3, "refuse", reason="not today")
    assert refused == Reply(3, error="ValueError: not today")
    assert "Traceback" in talker.log_tail()
    assert ask(talker, 4, "no_such_verb").error.startswith("AttributeError: ")
    assert ask(talker, 5, "whole") == Reply(5, "whole") and talker.death() is None


def test_the_log_is_quoted_from_this_start_on(talker):
    """The last 20 lines of it; of the last one a screen's width, without empty ones behind it."""
    ask(talker, 1, "whole")
    assert "from an earlier start" not in talker.log_tail()
    ask(talker, 6, "say", lines=[f"line {n}" for n in range(30)] + ["z" * 500, "", ""])
    head, *lines = talker.log_tail().splitlines()
    assert head.endswith("engine0.txt:") and len(lines) == 20 and "  line 29" in lines
    assert talker.last_line() == "z" * 100


def test_environment_of_the_trainer_stays_outside(talker):
    """vLLM would join its rendezvous, and have one queue of the device for all its streams."""
    entries = Path(f"/proc/{talker.pid}/environ").read_text().split("\0")
    names = {entry.partition("=")[0] for entry in entries}
    assert "TEST_MARK" in names and not names & set(TRAINERS)


def test_a_held_process_keeps_nobody_waiting(talker):
    """Neither who posts more than the pipe takes nor who looks for replies; all of it arrives when
    the process runs again."""
    ask(talker, 1, "whole")
    os.kill(talker.pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        for number in (7, 8, 9):
            talker.post(Request(number, "size_of", {"data": LARGE}))
        assert talker.replies(0.05) == [] and talker.death() is None
        assert time.monotonic() - begin < 1
    finally:
        os.kill(talker.pid, signal.SIGCONT)
    assert replies_until(talker, 9) == [Reply(number, len(LARGE)) for number in (7, 8, 9)]


def test_a_busy_process_keeps_nobody_waiting(talker):
    talker.post(Request(1, "sleep", {"seconds": 0.6}))
    begin = time.monotonic()
    talker.post(Request(2, "size_of", {"data": LARGE}))
    assert time.monotonic() - begin < 0.5
    assert [reply.number for reply in replies_until(talker, 2)] == [1, 2]


def test_a_killed_process_is_noticed_at_once(process):
    assert process.death() is None
    os.kill(process.pid, signal.SIGKILL)
    begin = time.monotonic()
    assert process.replies(60) == []
    assert process.death().startswith("killed by SIGKILL.\nLast lines of ")
    assert time.monotonic() - begin < 2
    process.post(Request(1, "whole"))
    assert process.death().startswith("killed by SIGKILL."), "and it stays dead"


def test_a_process_that_cannot_start_says_why_in_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_process, "CHILD_MODULE", "tests.engine.no_such_child")
    process = EngineProcess(tmp_path / "engine.txt", {})
    process.post(Request(1, "size_of", {"data": LARGE}))
    assert process.replies(60) == []
    death = process.death()
    assert death.startswith("exit code 1.") and "No module named tests.engine.no_such" in death


def test_an_engine_that_has_lost_a_worker_ends_instead_of_answering(process):
    """It would refuse all that it is asked, as if that were what is wrong."""
    process.post(Request(3, "lose_a_worker"))
    deadline = time.monotonic() + 60
    while process.death() is None:
        assert time.monotonic() < deadline
        assert process.replies(0.1) == []
    assert "exit code 1" in process.death() and "no worker answers" in process.death()


@pytest.mark.parametrize(
    "then,how", [("fail", "exit code 0."), ("die", "killed by SIGKILL.")], ids=["fails", "dies"]
)
def test_what_a_dead_process_has_said_is_not_lost(process, then, how):
    """It is gone long before it is read. Its own children go with it."""
    process.post(Request(1, "start_worker"))
    process.post(Request(2, "add", {"to": 3, "then": then}))
    child = psutil.Process(process.pid)
    wait_until_gone(lambda: [child] if is_alive(child) else [], 60)
    replies = process.replies(1)
    death = process.death()
    assert death.startswith(how)
    replies += process.replies(0)
    worker = psutil.Process(replies[0].value) if psutil.pid_exists(replies[0].value) else None
    wait_until_gone(lambda: [worker] if worker and is_alive(worker) else [], 5)
    assert replies[1:5] == [Reply(2), *(Reply(2, n, is_part=True) for n in range(3))]
    failure = [Reply(2, error="ValueError: no more numbers")]
    assert replies[5:] == (failure if then == "fail" else [])
    assert ("Traceback" in death) == (then == "fail")


def test_threads_and_pipes_end_with_their_process(tmp_path):
    """However it ended, and with messages on their way that it never took."""
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for number in range(20):
        process = EngineProcess(tmp_path / f"engine{number}.txt", {})
        if number % 2:
            os.kill(process.pid, signal.SIGSTOP)
            process.post(Request(1, "size_of", {"data": LARGE}))
        if number % 4 == 2:
            os.kill(process.pid, signal.SIGKILL)
            process.replies(60)
            assert process.death() is not None
        process.kill()
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == files
    assert not psutil.pid_exists(process.pid), "not even as a zombie"


def sockets_of(pid: int) -> set[str]:
    links = (f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd"))
    return {link for link in map(os.readlink, links) if link.startswith("socket:")}


def test_the_pipe_is_between_two_processes_alone(talker, process):
    """A pair of sockets without a name: a process that is started later inherits neither end, and
    nobody listens anywhere."""
    ours = os.readlink(f"/proc/self/fd/{talker._connection.fileno()}")
    (theirs,) = sockets_of(talker.pid)
    assert ours != theirs
    assert not sockets_of(process.pid) & {ours, theirs}
    for pid in (talker.pid, process.pid):
        (connection,) = psutil.Process(pid).net_connections("all")
        assert connection.family.name == "AF_UNIX" and not connection.laddr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_does_not_reach_the_pipe(talker):
    for pid in (os.getpid(), talker.pid):
        files = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
        _, nobody = start(try_to_open, NOBODY, pid, files)
        assert nobody.recv() == []


def test_no_orphan_when_the_trainer_is_killed(tmp_path):
    """Not even by SIGKILL, which leaves the trainer no word; not even while it starts."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "from megatron_eopd.rollout import engine_process\n"
        "from megatron_eopd.rollout.messages import Request\n"
        "engine_process.CHILD_MODULE = 'tests.engine.talking_child'\n"
        f"log = Path({str(tmp_path)!r})\n"
        "processes = [engine_process.EngineProcess(log / 'ready', {})]\n"
        "processes[0].post(Request(1, 'whole'))\n"
        "while not processes[0].replies(60): pass\n"
        "processes.append(engine_process.EngineProcess(log / 'starts', {}))\n"
        "print(*(process.pid for process in processes), flush=True)\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    engines = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
    assert len(engines) == 2 and all(map(is_alive, engines))
    trainer.kill()
    trainer.wait()
    wait_until_gone(lambda: [engine for engine in engines if is_alive(engine)], 20)
