"""metrics.jsonl: a line for each iteration and each evaluation, and the sinks beside it."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_eopd.metrics import guide, names
from megatron_eopd.metrics.rows import read_metrics
from megatron_eopd.metrics.sinks.background import close_all
from megatron_eopd.metrics.sinks.choice import open_sinks
from megatron_eopd.metrics.sinks.sink import Options, is_evaluation
from megatron_eopd.records import Histogram


class MetricsWriter:
    """metrics.jsonl of a run and its sinks, written on one rank.

    A run that resumes at iteration i forgets what a broken-off run wrote after i, so that all of
    them tell one story.
    """

    def __init__(
        self,
        run_dir: Path,
        resumed_at: int | None,
        trackers: Sequence[str] = ("tensorboard",),
        *,
        is_evaluated: bool = True,
        options: Options | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        """`resumed_at`: None of a run that begins. `is_evaluated`: whether the evaluation there was
        made before; otherwise a broken-off run may have made it after its checkpoint. `options`: of
        the run, for the sinks to show. `tell`: of a sink that is left out.

        Raises:
            ConfigError: a run that begins cannot open one of its trackers.
        """
        self._path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        self.tokens_total = self._truncate_after(resumed_at, is_evaluated)
        """Response tokens that the run has trained on."""
        self._is_complete = False
        first = 0 if resumed_at is None else resumed_at + 1
        self._sinks = open_sinks(trackers, run_dir, first, tell)
        self._file = self._path.open("a")
        if options is not None:
            self._introduce(first, options)

    def _truncate_after(self, iteration: int | None, is_evaluated: bool) -> int:
        """Returns the tokens of the rows that are kept."""
        if not self._path.is_file():
            return 0
        rows = read_metrics(self._path) if iteration is not None else []
        kept = [row for row in rows if row["iteration"] <= iteration]
        if not is_evaluated:
            kept = [row for row in kept if row["iteration"] < iteration or not is_evaluation(row)]
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(unfinished, self._path)
        return max((int(row.get("throughput/tokens_total", 0)) for row in kept), default=0)

    def _introduce(self, first: int, options: Options) -> None:
        """What the run is, what to watch, and what the names mean."""
        for sink in self._sinks:
            sink.about(options)
        self.text(first, "about/run", _options_table(options))
        self.text(first, "about/first_50_steps", guide.page())
        self.text(first, "about/metrics", names.page())

    def write(
        self,
        iteration: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Histogram] | None = None,
    ) -> None:
        """Scalars that are not finite are left out: JSON has neither NaN nor infinity."""
        self.tokens_total = int(scalars.get("throughput/tokens_total", self.tokens_total))
        finite = {n: rounded(value) for n, value in scalars.items() if math.isfinite(value)}
        self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(iteration, finite, histograms or {})

    def text(self, iteration: int, name: str, markdown: str) -> None:
        for sink in self._sinks:
            sink.text(iteration, name, markdown)

    def complete(self) -> None:
        """The run has come to its end; what is closed before was broken off."""
        self._is_complete = True

    def close(self) -> None:
        self._file.close()
        close_all(self._sinks, is_complete=self._is_complete)


def simple_options(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.key` → value, of a configuration's options that are a word or a number."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= simple_options(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float):
            found[f"{prefix}{key}"] = value
    return found


def _options_table(options: Options) -> str:
    """All values as code, which Markdown leaves alone."""
    harmless = str.maketrans({"`": "'", "|": "/", "\n": "↵"})
    shown = {name: str(value).translate(harmless) for name, value in options.items()}
    rows = [f"| `{name}` | `{value or ' '}` |" for name, value in shown.items()]
    return "\n".join(["| option | value |", "|---|---|", *rows])


def rounded(value: float) -> float:
    """To 12 significant digits: the mean of a constant is then the constant."""
    return float(f"{value:.12g}")
