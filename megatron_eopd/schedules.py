"""How an option moves from its first to its final value. In: how far the run is. Out: a number."""

import math
from typing import Literal


def scheduled(
    start: float, end: float | None, style: Literal["linear", "cosine"], done: float
) -> float:
    """`start` before the schedule, `end` behind it (None: no schedule); `done` is the share of it
    that lies behind, and may pass 1."""
    if end is None:
        return start
    done = min(max(done, 0.0), 1.0)
    if style == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return start + done * (end - start)
