"""What a stage queues on the device is paid in it, in seconds and in bytes."""

from types import SimpleNamespace

import pytest
import torch

from megatron_eopd import run_log
from megatron_eopd.run_log import DeviceGauge, StageTimes, gauge_of


class QueueingDevice:
    """Kernels take their time when somebody waits for them, and not before."""

    def __init__(self, monkeypatch):
        self.clock, self.queued, self.events = 0.0, 0.0, []
        self.used = self.peak = 0
        monkeypatch.setattr(run_log.time, "monotonic", self.read_clock)

    def read_clock(self) -> float:
        self.events.append("clock")
        return self.clock

    def synchronize(self) -> None:
        self.events.append("synchronize")
        self.clock, self.queued = self.clock + self.queued, 0.0

    def take_peak(self) -> int:
        peak, self.peak = self.peak, self.used
        return peak

    def run(self, seconds: float, num_bytes: int) -> None:
        """Queues a kernel with a temporary of its own."""
        self.queued += seconds
        self.peak = max(self.peak, self.used + num_bytes)

    def times(self) -> StageTimes:
        gauge = DeviceGauge(self.synchronize, self.take_peak)
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
    assert times.total == 6.5


def test_the_device_is_waited_for_before_the_clock_is_read(device):
    times = device.times()
    device.events.clear()
    with times("train"):
        pass
    assert device.events == ["synchronize", "clock"] * 2


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


def test_on_a_cpu_nothing_is_waited_for():
    gauge = gauge_of(torch.device("cpu"))
    assert gauge.synchronize() is None and gauge.take_peak() == 0


def test_on_a_gpu_its_own_device_is_asked(monkeypatch):
    asked = []
    for name, answer in (
        ("synchronize", None),
        ("max_memory_allocated", 7),
        ("reset_peak_memory_stats", None),
    ):
        note = lambda device, name=name, answer=answer: asked.append((name, device)) or answer  # noqa: E731
        monkeypatch.setattr(torch.cuda, name, note)
    device = torch.device("cuda", 3)
    gauge = gauge_of(device)
    gauge.synchronize()
    assert gauge.take_peak() == 7
    names = ["synchronize", "max_memory_allocated", "reset_peak_memory_stats"]
    assert asked == [(name, device) for name in names]
