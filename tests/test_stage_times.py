"""What a stage queues on the device is paid in it, in seconds and in bytes."""

from types import SimpleNamespace

import pytest
import torch

from megatron_eopd import run_log
from megatron_eopd.run_log import DeviceGauge, StageTimes, gauge_of


class QueueingDevice:
    """What the host queues is done one after the other, at a time that a mark knows."""

    def __init__(self, monkeypatch):
        self.done, self.waits = 0.0, 0
        self.used = self.peak = 0
        monkeypatch.setattr(run_log.time, "monotonic", lambda: 0.0)

    def seconds(self, begin: float, end: float) -> float:
        self.waits += 1
        return end - begin

    def take_peak(self) -> int:
        peak, self.peak = self.peak, self.used
        return peak

    def run(self, seconds: float, num_bytes: int) -> None:
        """Queues a kernel with a temporary of its own."""
        self.done += seconds
        self.peak = max(self.peak, self.used + num_bytes)

    def times(self) -> StageTimes:
        gauge = DeviceGauge(lambda: self.done, self.seconds, self.take_peak)
        return StageTimes(SimpleNamespace(stage="start-up"), "iteration 0", gauge)


@pytest.fixture
def device(monkeypatch) -> QueueingDevice:
    return QueueingDevice(monkeypatch)


def test_a_stage_pays_for_what_it_has_queued(device):
    times = device.times()
    with times("score"):
        device.run(2.0, 10)
    with times("train"):
        device.run(3.0, 40)
    device.run(1.0, 70)
    with times("sync"):
        device.run(0.5, 20)
    assert times.seconds == {"score": 2.0, "train": 3.0, "sync": 0.5}
    assert times.peaks == {"": 70, "score": 10, "train": 40, "sync": 20}


def test_nobody_waits_for_the_device_until_somebody_asks_for_seconds(device):
    times = device.times()
    with times("train"), times("score"):
        device.run(1.0, 0)
    assert device.waits == 0
    assert times.seconds == {"train": 0.0, "score": 1.0} and device.waits > 0


def test_a_stage_within_another_counts_for_itself_alone(device):
    """Also for what the outer one had queued when the inner one began."""
    times = device.times()

    def scored():
        for n in range(2):
            device.run(1.0, 100 * n)
            yield n

    with times("train"):
        device.run(4.0, 30)
        for _ in times.each("score", scored()):
            device.run(2.0, 50)
    assert times.seconds == {"train": 8.0, "score": 2.0}
    assert times.peaks == {"": 0, "train": 50, "score": 100}


def test_what_was_before_an_iteration_is_no_part_of_it(device):
    device.run(0.0, 1000)
    times = device.times()
    with times("train"):
        device.run(0.0, 3)
    assert max(times.peaks.values()) == 3


def test_on_a_cpu_a_mark_is_the_time():
    gauge = gauge_of(torch.device("cpu"))
    begin = gauge.mark()
    assert 0 <= gauge.seconds(begin, gauge.mark()) < 1 and gauge.take_peak() == 0


def test_on_a_gpu_events_of_its_own_device_are_the_marks(monkeypatch):
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            asked.append(("record", stream))

        def synchronize(self):
            asked.append(("synchronize", None))

        def elapsed_time(self, end):
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, answer in (
        ("current_stream", "stream"),
        ("max_memory_allocated", 7),
        ("reset_peak_memory_stats", None),
    ):
        note = lambda device, name=name, answer=answer: asked.append((name, device)) or answer  # noqa: E731
        monkeypatch.setattr(torch.cuda, name, note)
    device = torch.device("cuda", 3)
    gauge = gauge_of(device)
    begin, end = gauge.mark(), gauge.mark()
    assert asked == [("current_stream", device), ("record", "stream")] * 2
    assert gauge.seconds(begin, end) == 1.5
    assert gauge.take_peak() == 7
    names = [("synchronize", None), ("max_memory_allocated", device)]
    assert asked[4:] == [*names, ("reset_peak_memory_stats", device)]
