"""What a run says: lines on the terminal and in RUN_DIR/log/, and the time its stages take."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


class RunLog:
    """Lines of this rank. Every rank has a file; only rank 0 also speaks on the terminal."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._speaks = rank == 0
        path = run_dir / "log" / f"rank{rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def line(self, text: str) -> None:
        self._file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")
        if self._speaks:
            tqdm.write(text)

    def error(self, text: str) -> None:
        """Like line, but on stderr, and from any rank."""
        self._file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def progress(self, first: int, total: int) -> tqdm:
        """A bar over iterations; none where the terminal is a file or another rank's."""
        return tqdm(initial=first, total=total, unit="iter", disable=None if self._speaks else True)

    def close(self) -> None:
        self._file.close()


class StageTimes:
    """Seconds per stage of one iteration: `with times("score"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.monotonic()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - begin

    @property
    def total(self) -> float:
        return time.monotonic() - self._begin
