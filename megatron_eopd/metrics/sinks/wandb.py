"""Weights & Biases: RUN_DIR/wandb, and its service unless WANDB_MODE=offline.

Its own environment variables hold, WANDB_PROJECT, WANDB_NAME and WANDB_ENTITY among them. Asking
for a login and the end of its process need names that are not public: setup.py fixes the version.
"""

import atexit
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

import wandb
from wandb.errors import AuthenticationError
from wandb.sdk import wandb_setup
from wandb.sdk.lib.wbauth import authenticate_session

from megatron_eopd.metrics.histogram import coarse
from megatron_eopd.metrics.sinks.ledger import NOWHERE, Ledger, Place, place_of
from megatron_eopd.metrics.sinks.sink import Options
from megatron_eopd.records import Histogram

PROJECT = "megatron_eopd"
OPEN_S = 50.0
"""Less than background.OPEN_S: W&B then says itself what is wrong."""
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
        if missing := missing_login():  # it would be asked for
            raise AuthenticationError(missing)
        _start_process()
        self._run = wandb.init(
            dir=run_dir,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            id=self._ledger.known.id,
            resume="allow",
            # What the terminal shows is in RUN_DIR/log, the state of the code in RUN_DIR.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, init_timeout=OPEN_S
            ),
        )
        self._last_row = NOWHERE
        self._texts: dict[str, wandb.Html] = {}
        """Those in front of their row."""
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
            self._log(place, {**scalars, **shown, **self._texts})
            self._texts, self._last_row = {}, place
            self._ledger.note(place)

    def text(self, iteration: int, name: str, markdown: str) -> None:
        place = (iteration, name == "evaluation")
        if not self._ledger.is_new(place):
            return
        page = wandb.Html(f"<pre>{escape(markdown)}</pre>", inject=False)
        if place > self._last_row:
            self._texts[name] = page
        else:
            self._log(place, {name: page}, is_behind=True)

    def close(self, *, is_complete: bool) -> None:
        self._run.finish(exit_code=0 if is_complete else 1)
        self._ledger.save()
        wandb.teardown()  # its process; the run itself may end without Python's own farewell

    def _log(self, place: Place, values: dict, *, is_behind: bool = False) -> None:
        """`is_behind`: a text, of the row before it. What is sent again after a kill has the step
        that it had, and W&B takes no notice of steps below the last one that it has."""
        iteration, is_evaluation = place
        step = 4 * iteration + 2 * is_evaluation + is_behind
        # Steps may have several texts, and these can wait for the next row.
        self._run.log({**values, "iteration": iteration}, step=step, commit=not is_behind)


def missing_login() -> str:
    """Nothing where there is one, or none is needed."""
    settings = wandb_setup.singleton().settings
    if settings._offline or settings._noop:
        return ""
    try:
        found = authenticate_session(
            host=settings.base_url, source="logging.trackers", prompt=False
        )
    except AuthenticationError as error:
        return str(error).rstrip(".")
    return "" if found else f"there is no login for {settings.base_url}"


def _start_process() -> None:
    """Where `close` has not come to its end when Python ends, wandb would wait for its process, and
    that for its service, for hours. Instead it is ended: what it has not sent is in RUN_DIR/wandb,
    and wandb sync sends it."""
    service = wandb.setup()._connection
    if service is not None and service._proc is not None:
        service._cleanup()  # unregisters the wait
        atexit.register(service._proc._process.kill)  # nothing where it has ended by itself


def _shown(histogram: Histogram) -> wandb.Histogram:
    borders, counts = coarse(histogram, MOST_BUCKETS)
    return wandb.Histogram(np_histogram=(counts, borders))
