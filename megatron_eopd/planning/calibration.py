"""Factors from what a run measured to what would have been estimated for it.

In: a run directory. Out: a Calibration, by which the estimates of other layouts are scaled.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from megatron_eopd.config import Config, ConfigError
from megatron_eopd.metrics import read_metrics
from megatron_eopd.planning.activations import Lengths
from megatron_eopd.planning.search import Request, make_plan
from megatron_eopd.planning.shapes import Models
from megatron_eopd.planning.time import STAGES, Calibration


@dataclass(frozen=True)
class MeasuredRun:
    """What a run directory says of itself."""

    config: Config
    world_size: int
    response_length: float
    """The mean."""
    seconds: dict[str, float]
    """Stage → its median over the iterations; the first, which warms up, only where it is alone."""
    cuda_peak: float | None
    """Bytes that PyTorch had allocated on rank 0; None without a GPU."""

    @classmethod
    def read(cls, run_dir: Path) -> "MeasuredRun":
        """
        Raises:
            ConfigError: a file of the run is missing, or no iteration was finished.
        """
        paths = [run_dir / name for name in ("config.json", "ranks.txt", "metrics.jsonl")]
        for path in paths:
            if not path.is_file():
                raise ConfigError(f"{path}: no such file. Give the run_dir of a run that trained.")
        rows = [row for row in read_metrics(paths[2]) if "time/total" in row]
        if not rows:
            raise ConfigError(f"{paths[2]}: no finished iteration. Let the run go on for a few.")
        rows = rows[1:] or rows
        peaks = [row["memory/cuda_peak_gib"] for row in rows if "memory/cuda_peak_gib" in row]
        try:
            config = Config.model_validate(json.loads(paths[0].read_text()))
        except ValueError as error:  # no JSON, or options that other versions had
            raise ConfigError(f"{paths[0]}: {error}") from None
        return cls(
            config=config,
            world_size=len(paths[1].read_text().splitlines()) - 1,  # a line of titles
            response_length=sum(row["rollout/length_mean"] for row in rows) / len(rows),
            seconds={name: median(row.get(f"time/{name}", 0.0) for row in rows) for name in STAGES},
            cuda_peak=max(peaks) * 2**30 if peaks else None,
        )


def calibrate(run: MeasuredRun, request: Request) -> Calibration:
    """Factors from a run to what would have been estimated for it, with the request's prompts.

    Raises:
        ConfigError: the models of the run are not there any more.
    """
    response = max(1, round(run.response_length))
    past = replace(
        request,
        config=run.config,
        models=Models.of(run.config),
        num_gpus=run.world_size,
        longest=Lengths(request.longest.prompt, run.config.rollout.max_response_length),
        mean=Lengths(request.mean.prompt, response),
    )
    plan = make_plan(run.config, past)
    seconds = {
        name: run.seconds[name] / estimated
        for name, estimated in plan.time.stages.items()
        if estimated > 0 and run.seconds[name] > 0
    }
    if run.cuda_peak is None:
        return Calibration(seconds)
    # Rank 0 measured, and only what PyTorch itself allocates.
    memory = plan.memory.stages["student"][0]
    counted = memory.always - memory.engine
    return Calibration(seconds, max(0.0, run.cuda_peak - counted) / (memory.peak - memory.always))
