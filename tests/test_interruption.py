"""When a run stops: what still fits, and what signals do to a process."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_eopd.errors import Interrupted
from megatron_eopd.interruption import EXIT_STOPPED, Interruption, fits
from megatron_eopd.leaving import leave_if_stopped
from megatron_eopd.parallel.init import free_port
from megatron_eopd.parallel.meeting import began_at, note_stop, torchrun_store
from megatron_eopd.run_log import RunLog

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("left_s", "rest_s", "save_s", "expected"),
    [
        (25, 10, 5, True),
        (25, 12, 10, False),  # no two iterations take the same time
        (25, None, 5, False),
        (25, 10, None, False),
        (-1, 0, 0, False),
    ],
)
def test_what_was_measured_fits_with_some_slack(left_s, rest_s, save_s, expected):
    assert fits(left_s, rest_s, save_s) is expected


@pytest.fixture
def stop(tmp_path):
    """(What is asked, the signals that it hears); alone in its group, between two iterations of
    which each took about 0.2 s."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    signals = SimpleNamespace(noted=None, deadline=float("inf"), is_saving=False)

    def make(limit: float | None = None, save_s: float | None = 0.0) -> Interruption:
        made = Interruption(signals, RunLog(tmp_path, 0), dist.group.WORLD, limit)
        made.pause("begin", is_boundary=True)
        time.sleep(0.1)
        made.pause("step 0 round 0", until="step 0")
        time.sleep(0.1)
        made.pause("step 0")
        made.end_iteration(save_s)
        return made

    yield make, signals
    dist.destroy_process_group()


def note(signals: SimpleNamespace, grace_s: float) -> None:
    signals.noted, signals.deadline = "SIGTERM", time.monotonic() + grace_s


def test_an_iteration_that_fits_is_finished_and_none_is_begun(stop):
    make, signals = stop
    interruption = make()
    note(signals, grace_s=5)
    for point in ("rollouts", "step 1"):  # never seen: nobody knows how long it takes from there
        with pytest.raises(Interrupted, match="by SIGTERM"):
            interruption.pause(point)
    interruption.pause("begin")
    interruption.pause("step 0")
    with pytest.raises(Interrupted):
        interruption.pause("begin", is_boundary=True)


def test_what_does_not_fit_is_broken_off(stop):
    """A step may still fit that its iteration does not; and a save that nobody has timed never."""
    make, signals = stop
    interruption = make()
    note(signals, grace_s=0.2)
    interruption.pause("step 0 round 0", until="step 0")
    with pytest.raises(Interrupted):
        interruption.pause("begin")
    note(signals, grace_s=5)
    with pytest.raises(Interrupted):
        make(save_s=None).pause("step 0")


def test_a_limit_stops_at_the_boundary_from_which_an_iteration_does_not_fit(stop):
    make, _ = stop
    make(time.monotonic() + 60).pause("begin", is_boundary=True)
    late = make(time.monotonic() + 0.4)
    late.pause("step 0")
    with pytest.raises(Interrupted, match=r"by checkpoint\.exit_duration_minutes"):
        late.pause("begin", is_boundary=True)


def test_a_wait_is_left_when_what_it_took_last_does_not_fit(stop):
    make, signals = stop
    interruption = make()
    assert not interruption.must_leave()
    with interruption.waiting("rollout"):
        assert not interruption.must_leave()
        time.sleep(0.1)
    note(signals, grace_s=5)
    with interruption.waiting("rollout"):
        assert not interruption.must_leave()
        note(signals, grace_s=0.05)
        assert interruption.must_leave() == "SIGTERM"
        with pytest.raises(Interrupted):
            interruption.pause_in_wait()
    note(signals, grace_s=5)
    with interruption.waiting("evaluation"):
        assert interruption.must_leave()


@pytest.fixture
def torchrun(monkeypatch) -> dist.Store:
    """The store that it keeps for all starts of a job."""
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_what_torchrun_starts_after_a_stop_ends_with_the_same_code(torchrun, capsys):
    leave_if_stopped(torchrun_store())
    note_stop(torchrun_store(), "stopped in iteration 3 by SIGUSR1")
    with pytest.raises(SystemExit) as exit:
        leave_if_stopped(torchrun_store())
    assert exit.value.code == EXIT_STOPPED
    assert capsys.readouterr().out == "not started again: stopped in iteration 3 by SIGUSR1\n"


def test_a_limit_counts_from_the_first_start(torchrun):
    assert [began_at(torchrun_store(), now) for now in (100.5, 200.0)] == [100.5, 100.5]


PROCESS = """
import sys, time
from pathlib import Path
from megatron_eopd import stop_signals
from megatron_eopd.run_log import RunLog

stop_signals.SAME_S = 1.0
log = RunLog(Path(sys.argv[1]), 0)
signals = stop_signals.StopSignals(log, grace_s=float(sys.argv[2]))
signals.keeps_work, signals.is_saving = sys.argv[3] != "starts", sys.argv[3] == "saves"
log.stage = "iteration 7"
print("ready", flush=True)
if sys.argv[4] == "stuck":
    from multiprocessing import Lock
    lock = Lock()
    lock.acquire()
    lock.acquire()  # no instruction of the main thread comes after this one
while signals.noted is None:
    time.sleep(0.01)
signals.ignore()
Path(sys.argv[1], "leaving").touch()
time.sleep(0.5)
"""


@pytest.fixture
def process(tmp_path):
    started = []

    def start(grace_s: float, does: str, how: str = "free") -> subprocess.Popen:
        command = [sys.executable, "-c", PROCESS, str(tmp_path), str(grace_s), does, how]
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(child)
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_the_first_signal_is_noted_and_none_disturbs_the_end(process, tmp_path):
    child = process(60, "works")
    child.send_signal(signal.SIGUSR1)
    while not (tmp_path / "leaving").exists():
        time.sleep(0.01)
    child.terminate()
    assert child.wait(10) == 0
    assert child.stdout.read().startswith("SIGUSR1: stopping; what fits into 60 s")


@pytest.mark.parametrize(
    ("second", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_second_signal_ends_even_a_process_that_is_stuck(process, second, code):
    """But not one that comes with the first: a scheduler signals ranks, and so does torchrun."""
    child = process(60, "works", "stuck")
    child.terminate()
    child.send_signal(second)
    assert re.match(r"SIG\w+: stopping", child.stdout.readline())
    time.sleep(1.2)
    assert child.poll() is None
    child.send_signal(second)
    assert child.wait(10) == code
    assert f"{second.name} in iteration 7: the second signal" in child.stderr.read()


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("starts", "stopped by SIGTERM in iteration 7: another rank failed first"),
        ("works", r"in iteration 7, which was not done 0\.2 s \(checkpoint\.exit_grace_seconds\)"),
    ],
)
def test_who_is_stuck_or_has_nothing_to_save_speaks_and_ends(process, does, says):
    child = process(0.2, does, "stuck")
    child.terminate()
    assert child.wait(10) == 1
    assert re.search(says, child.stderr.read())


def test_a_save_is_not_ended_by_the_grace_time(process):
    child = process(0.2, "saves", "stuck")
    child.terminate()
    child.stdout.readline()
    assert child.stdout.readline().startswith("WARNING: 0.2 s (checkpoint.exit_grace_seconds)")
    assert child.poll() is None


def test_a_save_within_a_save_ends_no_protection():
    signals = SimpleNamespace(is_saving=False)
    stop = Interruption(signals, None, None)
    with stop.saving():
        with stop.saving():
            pass
        assert signals.is_saving, "what is written in the background is waited for here"
    assert not signals.is_saving
