"""What a tracking service already has of a run. In: rows as they come. Out: which of them are new.

A service forgets nothing, and a resumed run writes the iterations behind its checkpoint again. So
the last row that it was given is kept in RUN_DIR, and rows up to there are not sent twice.
"""

import json
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from megatron_eopd.metrics.sinks.sink import is_evaluation

Place = tuple[int, bool]
"""Iteration, and whether it is the evaluation behind it: they rise in the order of a run."""
NOWHERE: Place = (-1, False)


@dataclass(frozen=True)
class Known:
    id: str
    """Of the run, at the service."""
    place: Place = NOWHERE
    """Of the last row that was sent."""


class Ledger:
    """RUN_DIR/<service>/sent.json."""

    def __init__(self, path: Path, *, begins: bool, settles_s: float = 0.0) -> None:
        """`begins`: a run that begins is another one at the service, too. `settles_s`: how long
        what was sent may still be lost with a process that is killed."""
        self._path, self._settles_s = path, settles_s
        self.known = Known(uuid4().hex[:12])
        self.is_resumed = not begins and path.is_file()
        if self.is_resumed:
            found = json.loads(path.read_text())
            self.known = Known(found["id"], tuple(found["place"]))
        self._sent_before = self.known.place
        self._recent: deque[tuple[float, Known]] = deque()

    def rename(self, identity: str) -> None:
        """As the service calls the run."""
        self.known = replace(self.known, id=identity)
        self.save()

    def is_new(self, place: Place) -> bool:
        """Whether no earlier start has sent it."""
        return place > self._sent_before

    def note(self, place: Place) -> None:
        """A row was sent."""
        self.known = replace(self.known, place=max(self.known.place, place))
        now = time.monotonic()
        self._recent.append((now, self.known))
        settled = None
        while self._recent and self._recent[0][0] <= now - self._settles_s:
            settled = self._recent.popleft()[1]
        if settled is not None:
            self._write(settled)

    def save(self) -> None:
        """All that was sent is safe there."""
        self._recent.clear()
        self._write(self.known)

    def _write(self, known: Known) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(asdict(known)))
        os.replace(unfinished, self._path)


def place_of(iteration: int, scalars: Mapping[str, float]) -> Place:
    return iteration, is_evaluation(scalars)
