"""Which errors end a run with one line, whatever raised them."""

import errno
import threading

import pytest

from megatron_eopd.errors import ConfigError, DiskError, LostRankError
from megatron_eopd.leaving import as_expected, let_threads_be_quiet
from megatron_eopd.run_log import RunLog


def test_a_disk_that_takes_no_more_is_told_with_its_file():
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")
    expected = as_expected(full, "stage sync of iteration 3")
    assert isinstance(expected, DiskError)
    for part in ("runs/a/metrics.jsonl", "No space left", "stage sync of iteration 3", "Make room"):
        assert part in str(expected)
    assert "a file of the run" in str(as_expected(OSError(errno.EFBIG, "File too large"), "x"))


def test_a_lost_rank_is_one_in_whatever_collective_it_is_noticed():
    lost = as_expected(RuntimeError("Connection closed by peer [127.0.0.1]:2"), "iteration 3")
    assert isinstance(lost, LostRankError) and "iteration 3" in str(lost)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "x"), RuntimeError("shape"), KeyError(1)])
def test_a_fault_of_the_project_keeps_its_traceback(error):
    assert as_expected(error, "iteration 3") is None


def test_what_is_expected_stays_what_it_is():
    error = ConfigError("no such file")
    assert as_expected(error, "iteration 3") is error


def test_a_full_disk_does_not_silence_the_last_words(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, rank=1)
    monkeypatch.setattr(log, "_file", open("/dev/full", "w", buffering=1))  # noqa: SIM115
    log.line("one")
    log.error("two")
    log.close()
    assert "two" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error,prints", [(OSError(errno.ENOSPC, "full"), False), (KeyError("of ours"), True)]
)
def test_threads_of_libraries_are_quiet_about_what_is_told(error, prints, monkeypatch):
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    let_threads_be_quiet()

    def fail():
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert bool(printed) == prints
