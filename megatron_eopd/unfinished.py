"""An iteration that was broken off. In its checkpoint: two files. Out: what is there already.

The resumed run takes the rollouts and the reports of the steps that were taken from there, and has
only the rest to do.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_eopd.checkpoints.position import read_position
from megatron_eopd.config import Config
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import CheckpointError, ConfigError
from megatron_eopd.records import Bins, Histogram, Rollout, StepFault, StepReport
from megatron_eopd.rollout.recording import read_rollouts, rollout_lines

ROLLOUTS, REPORTS = "rollouts.jsonl", "reports.json"


@dataclass
class Unfinished:
    """What there is of an iteration so far, the same on every rank."""

    iteration: int
    is_evaluated: bool = False
    """Whether the evaluation that is due before it was made."""
    is_saved: bool = False
    """Whether a checkpoint holds all of this."""
    rollouts: list[Rollout] | None = None
    reports: list[StepReport] = field(default_factory=list)
    """Of its optimizer steps."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of the evaluation before them; none once a step is taken."""

    @property
    def steps_done(self) -> int:
        return len(self.reports)

    def add_rollouts(self, rollouts: list[Rollout]) -> None:
        self.rollouts, self.is_saved = rollouts, False

    def add_step(self, report: StepReport) -> None:
        self.reports.append(report)
        self.figures, self.is_saved = {}, False

    def files(self, config: Config, tokenizer: Tokenizer) -> dict[str, str]:
        """Name → text, for its checkpoint."""
        if self.rollouts is None:
            return {}
        sizes = {"global_batch_size": config.training.global_batch_size}
        reports = [asdict(report) for report in self.reports]
        return {
            ROLLOUTS: "".join(rollout_lines(self.rollouts, tokenizer)),
            REPORTS: json.dumps(sizes | {"reports": reports}),
        }


def read_unfinished(directory: Path, iteration: int, config: Config) -> Unfinished:
    """From the checkpoint that a run goes on from.

    Raises:
        ConfigError: the batch sizes are others, and what is left would not be the rest.
        CheckpointError: a file cannot be read.
    """
    work = Unfinished(iteration, is_evaluated=True, is_saved=True)
    work.figures = read_position(directory).figures
    if not (directory / ROLLOUTS).is_file():
        return work
    rollouts = [rollout for _, rollout in read_rollouts(directory / ROLLOUTS)]
    try:
        found = json.loads((directory / REPORTS).read_text())
        reports = [_decode(row) for row in found["reports"]]
        written = (len(rollouts), found["global_batch_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / REPORTS}: cannot be read ({error}).") from None
    now = (config.rollout.batch_size, config.training.global_batch_size)
    if written[0] != now[0] or (reports and written != now):
        raise ConfigError(
            f"{directory} was written within iteration {iteration}, with rollout.batch_size="
            f"{written[0]} and training.global_batch_size={written[1]}; now they are {now[0]} and "
            f"{now[1]}. Go on with the former, and change them from a checkpoint between two "
            f"iterations, or set checkpoint.resume to an earlier one."
        )
    work.rollouts, work.reports = rollouts, reports
    return work


def _decode(row: Mapping) -> StepReport:
    """From what dataclasses.asdict made of it, through JSON."""
    sums = {name: tuple(pair) for name, pair in row["sums"].items()}
    histograms = {
        name: Histogram(Bins(**each["bins"]), tuple(each["counts"]))
        for name, each in row.get("histograms", {}).items()  # older code kept every value instead
    }
    fault = StepFault(**row["fault"]) if row["fault"] else None
    return StepReport(row["grad_norm"], row["lr"], sums, histograms, fault)
