"""The engine process and its end. vLLM is never started in it: it refuses every request, or a
stand-in answers in parts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_eopd.errors import EngineError, Interrupted
from megatron_eopd.rollout import engine_process
from megatron_eopd.rollout.engine_process import EngineProcess

REPOSITORY = Path(__file__).parents[1]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs after {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def process(tmp_path):
    process = EngineProcess("test engine", tmp_path / "log" / "engine.txt", {"TEST_MARK": "here"})
    yield process
    process.close()
    assert not is_running(process.pid)


@pytest.fixture
def talker(tmp_path, monkeypatch):
    """A process that answers in parts."""
    monkeypatch.setattr(engine_process, "CHILD_MODULE", "tests.engine.talking_child")
    talker = EngineProcess("talker", tmp_path / "talker.txt", {})
    yield talker
    talker.close()
    assert not is_running(talker.pid)


def ask(talker: EngineProcess, verb: str, **options):
    return talker.ask(verb, **({"doing": "counting", "wait_s": 30} | options))


def test_refusal_names_the_request_and_quotes_the_log(process):
    """A verb that fails answers, and the process goes on."""
    for _ in range(2):
        with pytest.raises(EngineError) as caught:
            process.ask("begin_update", doing="taking weights", wait_s=30, timeout_s=1)
        assert "test engine failed while taking weights: " in str(caught.value)
        assert "engine.txt:\n" in str(caught.value) and "Traceback" in str(caught.value)


def test_killed_process_is_noticed_at_once(process):
    process.post("begin_update", doing="x", timeout_s=1)
    with pytest.raises(EngineError, match="failed"):
        process.answer(30)
    os.kill(process.pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"test engine died while resting: killed by SIGKILL"):
        process._doing = "resting"
        process.answer(60)
    assert time.monotonic() - begin < 1
    with pytest.raises(EngineError, match="died"):  # and every later request says so as well
        process.ask("begin_update", doing="y", wait_s=60, timeout_s=1)


def test_late_process_is_killed(process):
    os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within 1 s while hanging, and was killed"):
        process.ask("begin_update", doing="hanging", wait_s=1, timeout_s=1)
    assert time.monotonic() - begin < 3
    wait_until_gone(process.pid)


def test_a_wait_that_must_be_left_is_and_takes_the_process_with_it(process):
    os.kill(process.pid, signal.SIGSTOP)
    reasons = iter([None, "SIGTERM"])
    with pytest.raises(Interrupted, match="stopped by SIGTERM while test engine was generating"):
        process.ask(
            "begin_update",
            doing="generating",
            wait_s=60,
            must_leave=lambda: next(reasons),
            timeout_s=1,
        )
    wait_until_gone(process.pid)


def test_parts_are_handed_on_before_the_answer(talker):
    """In order, each once, and the next answer is the next request's."""
    for _ in range(2):
        parts = []
        assert ask(talker, "count", take_part=parts.append, to=200) is None
        assert parts == list(range(200))
        assert ask(talker, "whole") == "whole"
    parts = []
    with pytest.raises(EngineError, match="failed while counting: ValueError: no more numbers"):
        ask(talker, "count_and_fail", take_part=parts.append)
    assert parts == [0, 1, 2]
    assert ask(talker, "whole") == "whole"


def test_parts_of_a_process_that_has_died_are_not_lost(talker):
    """It is gone long before they are read."""
    parts = []

    def take(part: int) -> None:
        wait_until_gone(talker.pid)
        parts.append(part)

    with pytest.raises(EngineError, match="talker died while counting: killed by SIGKILL"):
        ask(talker, "count_and_die", take_part=take)
    assert parts == [0, 1, 2]


def test_who_cannot_take_a_part_ends_the_process(talker):
    """Or its further parts would answer the next request."""

    def take(part: int) -> None:
        if part == 3:
            raise ValueError(f"part {part} is one too many")

    with pytest.raises(ValueError, match="part 3 is one too many"):
        ask(talker, "count_for_ever", take_part=take)
    assert not is_running(talker.pid)


def test_parts_do_not_put_the_deadline_off(talker):
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within 1 s while counting, and was killed"):
        ask(talker, "count_for_ever", wait_s=1, take_part=lambda part: None)
    assert time.monotonic() - begin < 3
    assert not is_running(talker.pid)


def test_a_wait_is_left_between_two_parts(talker):
    parts = []
    with pytest.raises(Interrupted, match="stopped by SIGTERM while talker was counting"):
        ask(
            talker,
            "count_for_ever",
            take_part=parts.append,
            must_leave=lambda: "SIGTERM" if len(parts) == 3 else None,
        )
    assert parts == [0, 1, 2]
    assert not is_running(talker.pid)


def test_no_orphan_when_the_trainer_is_killed(tmp_path):
    """Not even by SIGKILL, which leaves the trainer no word."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "from megatron_eopd.rollout.engine_process import EngineProcess\n"
        f"process = EngineProcess('x', Path({str(tmp_path / 'log.txt')!r}), {{}})\n"
        "try: process.ask('begin_update', doing='x', wait_s=60, timeout_s=1)\n"
        "except Exception: print(process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    engine_pid = int(trainer.stdout.readline())
    assert is_running(engine_pid)
    trainer.kill()
    trainer.wait()
    wait_until_gone(engine_pid)


def test_environment_of_torchrun_stays_outside(tmp_path, monkeypatch):
    """vLLM would join the trainer's own rendezvous."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    process = EngineProcess("test engine", tmp_path / "engine.txt", {"TEST_MARK": "here"})
    try:
        with pytest.raises(EngineError):  # it has started once it has answered
            process.ask("begin_update", doing="x", wait_s=30, timeout_s=1)
        entries = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
        names = {entry.partition("=")[0] for entry in entries}
        assert "TEST_MARK" in names
        assert not names & {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    finally:
        process.close()
