"""One job at a time in a run's folder."""

import errno
import json
import socket
import subprocess
import sys
import threading
import time

import pytest

import megatron_eopd.run_lock as run_lock_module
from megatron_eopd.cli import run_command
from megatron_eopd.errors import ConfigError
from megatron_eopd.run_lock import LOCK, _namespace, _started, run_lock

QUICK = {"beat_s": 0.05, "silent_s": 0.4}


def test_a_lock_is_gone_when_its_job_ends(tmp_path):
    for _ in range(2):
        with run_lock(tmp_path / "run", **QUICK):
            assert json.loads((tmp_path / "run" / LOCK).read_text())["beat"] == 0
        assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(ValueError, match="mine"), run_lock(tmp_path, **QUICK):
        raise ValueError("mine")
    assert not (tmp_path / LOCK).exists()


def write_lock(path, **owner) -> None:
    common = {"host": "elsewhere", "pid": 7, "job": "x", "beat": 0}
    (path / LOCK).write_text(json.dumps(common | owner))


def test_a_living_job_on_this_host_is_named_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        here = {"host": socket.gethostname(), "namespace": _namespace(), "pid": other.pid}
        write_lock(tmp_path, **here, started=_started(other.pid))
        begin = time.monotonic()
        with pytest.raises(ConfigError, match=rf"another job works there, process {other.pid} on"):
            run_lock(tmp_path).__enter__()
        assert time.monotonic() - begin < 5, "without waiting for a beat"
        other.communicate(b"\n")
    with run_lock(tmp_path, **QUICK):  # it has ended
        pass
    write_lock(tmp_path, **here | {"pid": 1}, started="another process had its number")
    with run_lock(tmp_path, silent_s=60):
        pass


def test_a_job_elsewhere_is_known_by_its_beat(tmp_path):
    done = threading.Event()

    def beat():
        number = 0
        while not done.wait(0.05):
            number += 1
            write_lock(tmp_path, beat=number)

    write_lock(tmp_path)
    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(ConfigError, match="process 7 on elsewhere"):
            run_lock(tmp_path, **QUICK).__enter__()
    finally:
        done.set()
        heart.join()
    begin = time.monotonic()
    with run_lock(tmp_path, **QUICK):
        assert time.monotonic() - begin >= QUICK["silent_s"], "only once it is silent"


def test_a_job_that_came_since_another_was_found_dead_keeps_its_place(tmp_path, monkeypatch):
    judge = run_lock_module._refuse_the_living

    def judge_and_be_slow(path, silent_s):
        found = judge(path, silent_s)
        write_lock(tmp_path, job="came since", pid=8)
        return found

    monkeypatch.setattr(run_lock_module, "_refuse_the_living", judge_and_be_slow)
    write_lock(tmp_path)
    with pytest.raises(ConfigError, match="process 8 on elsewhere"):
        run_lock(tmp_path, **QUICK).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert json.loads((tmp_path / LOCK).read_text())["job"] == "came since"


def test_a_job_that_lost_its_place_does_not_take_it_back(tmp_path):
    with run_lock(tmp_path, **QUICK):
        write_lock(tmp_path, job="took it over")
        time.sleep(0.3)
        assert json.loads((tmp_path / LOCK).read_text())["job"] == "took it over"
    assert (tmp_path / LOCK).exists(), "nor away"


def test_a_full_disk_is_told_and_not_traced(tmp_path, capsys):
    """No rank has met another yet, so nobody else would tell it."""

    def work(_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "lock.json"))

    assert run_command(lambda: None, work) == 1
    assert "lock.json cannot be written, in start-up: No space left" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        run_command(lambda: None, lambda _: (tmp_path / "absent").read_text())


def test_a_lock_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(path, _):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space"), run_lock(tmp_path, **QUICK):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_lock_is_nobodys(tmp_path):
    (tmp_path / LOCK).write_text("{")
    with run_lock(tmp_path, **QUICK):
        assert json.loads((tmp_path / LOCK).read_text())["pid"]


def test_of_two_at_once_one_has_it(tmp_path):
    outcomes = []

    def compete():
        try:
            with run_lock(tmp_path, **QUICK):
                time.sleep(0.5)
                outcomes.append("had it")
        except ConfigError:
            outcomes.append("refused")

    write_lock(tmp_path)  # both find a silent one
    threads = [threading.Thread(target=compete) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["had it", "refused"]
