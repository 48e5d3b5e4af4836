"""What a run says: lines on the terminal and in RUN_DIR/log/, and the time its stages take."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from megatron_eopd.last_words import LastWords, read_last_words
from megatron_eopd.parallel.collectives import naming_stage
from megatron_eopd.records import RolloutProgress

Item = TypeVar("Item")
MINUTE_S = 60.0


def seconds_since_start() -> float:
    """Of this process, from Linux's own books: imports count too."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime, field 22 of proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class RunLog:
    """Lines of this rank. Every rank has a file; only rank 0 also speaks on the terminal."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._stage = "start-up"
        self._last_words: LastWords | None = None
        self.startup: dict[str, float] = {}
        """Seconds of the parts of the start."""
        self._rank = rank
        self._speaks = rank == 0
        self._pace: tuple[int, float] | None = None  # an iteration, and when it was finished
        self._rollout_bar: tqdm | None = None
        self._rollout_told = 0.0
        path = run_dir / "log" / f"rank{rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        self._last_words_path = path.with_name(f"rank{rank}.last_words.txt")

    @property
    def stage(self) -> str:
        """What this rank is doing, for when it is stopped from outside."""
        return self._stage

    @stage.setter
    def stage(self, stage: str) -> None:
        self._stage = stage
        if self._last_words is not None:
            self._last_words.note(stage)

    def keep_last_words(self) -> None:
        """Tell those of the start before, and keep the stage for the one that follows."""
        ending = read_last_words(self._last_words_path)
        if ending is not None:
            tell = self.error if ending.is_fault else self.line
            tell(f"rank {self._rank}, in the start before this one, {ending.text}")
        with suppress(OSError):
            self._last_words = LastWords(self._last_words_path, self._stage)

    def line(self, text: str) -> None:
        self._write(text)
        if self._speaks:
            tqdm.write(text)

    def error(self, text: str) -> None:
        """Like line, but on stderr, and from any rank."""
        self._write(text)
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a full disk is told on the terminal, and by what must be written
            self._file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")

    def progress(self, first: int, total: int) -> tqdm:
        """A bar over iterations; none where the terminal is a file or another rank's."""
        return tqdm(initial=first, total=total, unit="iter", disable=None if self._speaks else True)

    def bar(self, total: int, what: str) -> tqdm:
        """Of samples, within whatever else has one."""
        hidden = None if self._speaks else True
        return tqdm(total=total, desc=what, unit="sample", disable=hidden, leave=False)

    def watch_rollout(self, progress: RolloutProgress) -> None:
        """Of one call for samples: a bar on a terminal, and elsewhere a line a minute."""
        if self._rollout_bar is None:
            self._rollout_bar = self.bar(progress.total, "rollout")
            self._rollout_told = time.monotonic()
        bar = self._rollout_bar
        bar.update(progress.answered - bar.n)
        bar.set_postfix_str(progress.describe())
        if bar.disable and time.monotonic() - self._rollout_told > MINUTE_S:
            self._rollout_told = time.monotonic()
            left_s = progress.seconds * (progress.total / max(progress.answered, 1) - 1)
            self.line(
                f"rollout: {progress.answered} of {progress.total} responses, "
                f"{progress.describe()}, {left_s:.0f} s to go"
            )
        if progress.answered == progress.total:
            bar.close()
            self._rollout_bar = None

    def remaining_s(self, finished: int, total: int) -> float | None:
        """Seconds to the last iteration at the mean pace of this start, evaluations and checkpoints
        included; None after its first iteration, whose start nobody took down."""
        now = time.monotonic()
        if self._pace is None:
            self._pace = (finished, now)
            return None
        first, begin = self._pace
        return (now - begin) / (finished - first) * (total - finished)

    def close(self) -> None:
        if self._last_words is not None:
            self._last_words.remove()
        with suppress(OSError):
            self._file.close()


class DeviceGauge(NamedTuple):
    """How a stage's work on the device is seen from the host, which does not wait for it."""

    mark: Callable[[], Any]
    """The moment at which all that was queued until now is done."""
    seconds: Callable[[Any, Any], float]
    """From one mark to a later one. Waits until that has come."""
    take_peak: Callable[[], int]
    """The most bytes that were allocated at once since it was asked last."""


def gauge_of(device: torch.device) -> DeviceGauge:
    if device.type != "cuda":
        # An operation is done when it returns, and nobody counts what it allocates.
        return DeviceGauge(time.monotonic, lambda begin, end: end - begin, lambda: 0)
    return DeviceGauge(
        partial(_cuda_event, device), _cuda_seconds, partial(_take_cuda_peak, device)
    )


def _cuda_event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _cuda_seconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _take_cuda_peak(device: torch.device) -> int:
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class StageTimes:
    """Seconds and peak memory per stage of one iteration: `with times("score"): …`. A stage inside
    another counts for itself alone, and what it has queued on the device is paid in it."""

    def __init__(self, log: RunLog, where: str, gauge: DeviceGauge) -> None:
        """`where`: the iteration and this rank's place, for the message when a rank is lost."""
        self.peaks: dict[str, int] = {}
        """Bytes on the device; under the empty name what was outside of all stages."""
        self._log = log
        self._where = where
        self._gauge = gauge
        self._stage = ""
        self._spans: list[tuple[str, Any, Any]] = []  # stage, marks of its begin and its end
        gauge.take_peak()  # what was before is no part of this
        self._begin = time.monotonic()
        self._mark = gauge.mark()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        outer = self._stage
        self._cross_border_to(stage)
        outer_stage, self._log.stage = self._log.stage, f"stage {stage} of {self._where}"
        with naming_stage(self._log.stage):
            yield
        # Not after an exception: then the stage says where it was raised.
        self._log.stage = outer_stage
        self._cross_border_to(outer)

    def _cross_border_to(self, stage: str) -> None:
        peak = max(self.peaks.get(self._stage, 0), self._gauge.take_peak())
        mark = self._gauge.mark()
        self._spans.append((self._stage, self._mark, mark))
        self.peaks[self._stage], self._stage, self._mark = peak, stage, mark

    @property
    def seconds(self) -> dict[str, float]:
        """Of the stages that have ended. The only thing here that waits for the device."""
        seconds: dict[str, float] = {}
        for stage, begin, end in self._spans:
            if stage:
                seconds[stage] = seconds.get(stage, 0.0) + self._gauge.seconds(begin, end)
        return seconds

    def each(self, stage: str, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time to make each counts as the stage's."""
        while True:
            with self(stage):
                item = next(items, None)
            if item is None:
                return
            yield item
            del item  # nobody holds it while the next one is made

    @property
    def total(self) -> float:
        return time.monotonic() - self._begin
