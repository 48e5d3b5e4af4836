"""Weights & Biases: RUN_DIR/wandb, and its service unless WANDB_MODE=offline.

Its own environment variables hold, WANDB_PROJECT, WANDB_NAME and WANDB_ENTITY among them.
"""

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

import wandb

from megatron_eopd.metrics.histogram import coarse
from megatron_eopd.metrics.sinks.ledger import Ledger, Place, place_of
from megatron_eopd.metrics.sinks.sink import Options
from megatron_eopd.records import Histogram

PROJECT = "megatron_eopd"
MOST_BUCKETS = 512
"""More are refused."""
SETTLES_S = 30.0
"""Its process writes its file up to 15 s later, and a killed run takes it along. What is then sent
again has the step that it had."""


class Wandb:
    def __init__(self, run_dir: Path, first: int | None) -> None:
        path = run_dir / "wandb" / "sent.json"
        self._ledger = Ledger(path, begins=first == 0, settles_s=SETTLES_S)
        self._ledger.save()
        self._run = wandb.init(
            dir=run_dir,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            id=self._ledger.known.id,
            resume="allow",
            # What the terminal shows is in RUN_DIR/log, the state of the code in RUN_DIR.
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def about(self, options: Options) -> None:
        self._run.config.update(dict(options), allow_val_change=True)

    def write(
        self, iteration: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
    ) -> None:
        shown = {name: _shown(each) for name, each in histograms.items() if any(each.counts)}
        place = place_of(iteration, scalars)
        if self._ledger.is_new(place):
            self._log(iteration, {**scalars, **shown}, place)

    def text(self, iteration: int, name: str, markdown: str) -> None:
        if self._ledger.is_new((iteration, name == "evaluation")):
            page = wandb.Html(f"<pre>{escape(markdown)}</pre>", inject=False)
            self._log(iteration, {name: page})

    def close(self, *, is_complete: bool) -> None:
        self._run.finish(exit_code=0 if is_complete else 1)
        self._ledger.save()
        wandb.teardown()  # its process; the run itself may end without Python's own farewell

    def _log(self, iteration: int, values: dict, place: Place | None = None) -> None:
        # Its own steps must rise, over restarts too, and an iteration has several rows.
        step = self._ledger.known.rows
        self._run.log({**values, "iteration": iteration}, step=step, commit=True)
        self._ledger.note(place)


def _shown(histogram: Histogram) -> wandb.Histogram:
    borders, counts = coarse(histogram, MOST_BUCKETS)
    return wandb.Histogram(np_histogram=(counts, borders))
