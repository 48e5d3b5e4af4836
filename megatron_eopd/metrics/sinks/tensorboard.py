"""TensorBoard: RUN_DIR/tensorboard, in which every curve says what it is.

Descriptions and units are those of metrics.names, dashboards those of metrics.dashboards.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_eopd.metrics.dashboards import dashboards, figures_of_a_run
from megatron_eopd.metrics.histogram import coarse
from megatron_eopd.metrics.names import find
from megatron_eopd.metrics.sinks.sink import Options, is_evaluation
from megatron_eopd.records import Histogram

MOST_BUCKETS = 512
"""Of a histogram in the file."""
NO_HYPERPARAMETERS = ("checkpoint.", "logging.")
"""Options that change no weight; the table begins with the first ones of the alphabet."""


class TensorBoard:
    def __init__(self, run_dir: Path, first: int | None) -> None:
        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=first)
        self._options: Options | None = None
        self._end: Summary | None = None
        self._names: dict[str, None] = {}
        """Written by this start, in the order of their first values."""

    def about(self, options: Options) -> None:
        """Shown from the first iteration on: then the evaluation in front of it has said which
        tasks there are."""
        self._options = options

    def write(
        self, iteration: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
    ) -> None:
        if scalars:  # one event for all: 120 would fill the writer's queue
            self._writer.file_writer.add_summary(Summary(value=self._values(scalars)), iteration)
        for name, each in histograms.items():
            self._histogram(iteration, name, each)
        if self._options is not None and not is_evaluation(scalars):
            self._explain(self._options)
            self._options = None
        # Else the last two minutes are lost with a run that is killed, and it resumes behind them.
        self._writer.flush()

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._writer.add_text(name, markdown, iteration)

    def close(self, *, is_complete: bool) -> None:
        if is_complete and self._end is not None:
            self._writer.file_writer.add_summary(self._end)
        self._writer.close()

    def _values(self, scalars: Mapping[str, float]) -> Iterator[Summary.Value]:
        for name, value in scalars.items():
            if name in self._names:
                yield Summary.Value(tag=name, simple_value=value)
            else:  # what the first value of a tag says holds for all of them
                self._names[name] = None
                yield Summary.Value(tag=name, simple_value=value, metadata=_metadata(name))

    def _explain(self, options: Options) -> None:
        """The plugins for custom scalars and hyperparameters, in this run and not in another one
        below it, as SummaryWriter.add_hparams would."""
        self._writer.add_custom_scalars(dashboards(self._names))
        words = {
            name: str(value).lower() if isinstance(value, bool) else value
            for name, value in options.items()
            if not name.startswith(NO_HYPERPARAMETERS)
        }
        figures = dict.fromkeys(figures_of_a_run(self._names), 0.0)
        experiment, start, self._end = hparams(words, figures)
        for summary in (experiment, start):
            self._writer.file_writer.add_summary(summary)

    def _histogram(self, iteration: int, name: str, histogram: Histogram) -> None:
        borders, counts = coarse(histogram, MOST_BUCKETS)
        if not counts:
            return
        middles = [(low + high) / 2 for low, high in pairwise(borders)]
        moments = [
            sum(count * middle**power for count, middle in zip(counts, middles, strict=True))
            for power in (1, 2)
        ]
        # TensorBoard knows upper borders only: an empty bucket in front says where the first one
        # begins.
        self._writer.add_histogram_raw(
            name,
            borders[0],
            borders[-1],
            sum(counts),
            *moments,
            borders,
            [0, *counts],
            global_step=iteration,
        )


def _metadata(name: str) -> SummaryMetadata | None:
    metric = find(name)
    if metric is None:
        return None
    return SummaryMetadata(
        display_name=f"{name} [{metric.unit}]" if metric.unit else name,
        summary_description=metric.text,
        plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
        data_class=DATA_CLASS_SCALAR,  # without it TensorBoard's own server makes its own metadata
    )
