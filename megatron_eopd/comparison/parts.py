"""What is compared of two runs, and when two values count as the same."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_eopd.metrics.rows import read_metrics

LEFT_OUT = re.compile(
    r"time/|memory/|engine/|throughput/(?!tokens_total$)|weight_sync/(seconds|\w+_s)$"
)
"""Metrics that depend on the machine's speed and memory."""
SHOWN = 12
"""Lines of a table, the worst first."""


@dataclass
class Part:
    """What was compared of two runs."""

    name: str
    summary: str = ""
    problems: list[str] = field(default_factory=list)
    """Empty: equal."""


@dataclass(frozen=True)
class Run:
    """One of the two, read when it is asked for."""

    label: str
    path: Path

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        return read_metrics(path) if path.is_file() else []

    def metrics(self) -> Iterator[tuple[int, str, float]]:
        """(iteration, name, value) in the file's order, without what is left out."""
        for row in self.rows:
            for name, value in row.items():
                if name != "iteration" and not LEFT_OUT.match(name):
                    yield row["iteration"], name, value


def relative(x: float, y: float) -> float:
    """0 of equal numbers; infinite where one of them alone is not finite."""
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0.0
    difference = abs(x - y) / max(abs(x), abs(y))
    return difference if math.isfinite(difference) else math.inf


def same(x: Any, y: Any, rtol: float) -> bool:
    """Of what JSON holds."""
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k], rtol) for k in x)
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(same(i, j, rtol) for i, j in zip(x, y, strict=True))
    if isinstance(x, float) and isinstance(y, float):
        return relative(x, y) <= rtol
    return type(x) is type(y) and x == y


def listed(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:SHOWN]))
    return text + (f", … ({len(numbers)} of them)" if len(numbers) > SHOWN else "")
