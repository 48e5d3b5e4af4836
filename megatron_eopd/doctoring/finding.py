"""What was found of one thing, and how to look without ever failing."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    topic: str
    found: str
    """What there is, with its version."""
    use: str
    """What a run does with it, or without it."""
    cost: str = ""
    """What its absence costs, and what to do; empty where nothing is missing."""
    is_obstacle: bool = False
    """No run can start on this machine."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def look(topic: str, probe: Callable[[], Finding], *, is_needed: bool) -> Finding:
    """The probe's finding, or the error that it died of: a package may be missing, or fail in any
    way when it is imported. `is_needed`: without it no run can start."""
    try:
        return probe()
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        found = f"{type(error).__name__}: {lines[0]}"
        use = "no run can start" if is_needed else "not used"
        return Finding(topic, found, use, "see the error; make install", is_needed)
