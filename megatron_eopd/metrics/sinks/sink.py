"""What a place that shows metrics must be able to do.

It is made and called on rank 0 alone, on a thread of its own: it may wait, and may fail.
"""

from collections.abc import Mapping
from typing import Protocol

from megatron_eopd.records import Histogram

Options = Mapping[str, str | int | float | bool]
"""`section.key` → value, of the options whose values are simple."""


class Sink(Protocol):
    """A class that is made with (run directory, first iteration): what was written from there on is
    forgotten. 0: the run begins. None: nothing is forgotten, something is added to a run that may
    go on elsewhere."""

    def about(self, options: Options) -> None:
        """What the run was started with. Called once, before anything else."""
        ...

    def write(
        self, iteration: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
    ) -> None:
        """A row: of an iteration, or of the evaluation behind it. Finite values, by the names of
        metrics.names."""
        ...

    def text(self, iteration: int, name: str, markdown: str) -> None: ...

    def close(self, *, is_complete: bool) -> None:
        """`is_complete`: the run has come to its end, and was not broken off."""
        ...


def is_evaluation(scalars: Mapping[str, object]) -> bool:
    """Whether a row is an evaluation's."""
    return any(name.startswith("eval/") for name in scalars)
