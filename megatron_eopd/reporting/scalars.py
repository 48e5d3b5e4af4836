"""An iteration as named scalars and histograms. In: its records, on rank 0. Out: what metrics.jsonl
and the trackers show.

Pure functions, but for the peaks of memory, of which all ranks tell.
"""

import math
import resource
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_eopd.data.packing import PackedRollouts, load_imbalance, padding_fraction
from megatron_eopd.metrics.histogram import merge, percentile
from megatron_eopd.metrics.means import divide
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import Histogram, Rollout, StepReport
from megatron_eopd.rollout.engine import SyncReport
from megatron_eopd.run_log import StageTimes


def iteration_scalars(
    rollouts: Sequence[Rollout],
    reports: Sequence[StepReport],
    sync: SyncReport,
    times: StageTimes,
    memory: Mapping[str, float],
) -> dict[str, float]:
    """Everything that metrics.jsonl and the trackers show of one training iteration; `memory`: as
    memory_scalars has it."""
    scalars = divide(report.sums for report in reports) | percentiles(reports)
    scalars |= {
        "optim/grad_norm": _finite_mean([r.grad_norm for r in reports]),
        "optim/skipped_steps": sum(r.fault is not None for r in reports),
        "optim/lr": reports[-1].lr,
        "weight_sync/seconds": sync.seconds,
        "weight_sync/bytes": sync.num_bytes,
        "weight_sync/version": sync.version,
        **{f"weight_sync/{part}_s": seconds for part, seconds in sync.parts.items()},
        "weight_sync/probe_difference": sync.probe.difference if sync.probe else math.nan,
    }
    scalars |= _rollout_scalars(rollouts) | memory
    scalars |= {f"time/{stage}": seconds for stage, seconds in times.seconds.items()}
    scored = [seconds for stage, seconds in times.seconds.items() if stage.startswith("score_")]
    if scored:  # a stage within another counts for itself alone
        scalars["time/score"] = scalars.get("time/score", 0.0) + sum(scored)
    scalars["time/total"] = times.total
    scalars["throughput/tokens_per_s"] = num_tokens(rollouts) / times.total
    return scalars


def _finite_mean(values: Sequence[float]) -> float:
    """Over those that are finite; NaN of none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def num_tokens(rollouts: Sequence[Rollout]) -> int:
    """Of all responses."""
    return sum(len(r.response_ids) for r in rollouts)


def packing_scalars(plans: Sequence[PackedRollouts], layout: Layout) -> dict[str, float]:
    """Waste of the optimizer steps' plans; the same on every rank."""
    count = len(plans)
    return {
        "packing/padding_fraction": sum(padding_fraction(p, layout) for p in plans) / count,
        "packing/load_imbalance": sum(load_imbalance(p) for p in plans) / count,
        "packing/microbatches": sum(len(p[0]) for p in plans) / count,
    }


def histograms(reports: Sequence[StepReport]) -> dict[str, Histogram]:
    """Of the entropies at all tokens of an iteration, its sound steps together."""
    found = {}
    for name in ("entropy/teacher", "entropy/student"):
        steps = [r.histograms[name] for r in reports if name in r.histograms]
        if steps:
            found[name] = merge(steps)
    return found


def percentiles(reports: Sequence[StepReport]) -> dict[str, float]:
    """Those that metrics.jsonl has; where no step was sound, none."""
    scalars = {}
    for name, entropies in histograms(reports).items():
        scalars[f"{name}_p50"] = percentile(entropies, 0.5)
        scalars[f"{name}_p90"] = percentile(entropies, 0.9)
    # Of the first step alone, in which the student has the engine's weights.
    if (mismatch := reports[0].histograms.get("mismatch/logprob_abs")) is not None:
        scalars["mismatch/logprob_abs_p99"] = percentile(mismatch, 0.99)
    return scalars


def _rollout_scalars(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of the student's samples; of reference answers under a name of their own."""
    sampled = [r for r in rollouts if r.source == "sampled"]
    references = [r for r in rollouts if r.source == "reference"]
    scalars = {"rollout/reference_fraction": len(references) / len(rollouts)}
    if references:
        scalars["reference/length_mean"] = num_tokens(references) / len(references)
    if sampled:
        count = len(sampled)
        cut = sum(r.finish_reason == "length" for r in sampled)
        scalars |= {
            "rollout/length_mean": num_tokens(sampled) / count,
            "rollout/truncated_fraction": cut / count,
            "rollout/repetition": sum(_repetition(r.response_ids) for r in sampled) / count,
        }
    return scalars


def _repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of 4-grams that occurred earlier in the same response."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def memory_scalars(peaks: Mapping[str, int], context: ParallelContext) -> dict[str, float]:
    """Of the rank that has most, each: one all-reduce of a few numbers. `peaks`: of StageTimes."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    stages = sorted(stage for stage in peaks if stage)
    own = [host, max(peaks.values(), default=0), *(peaks[stage] for stage in stages)]
    most = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=context.cpu_group)
    names = ["memory/host_peak_gib", "memory/cuda_peak_gib"]
    names += [f"memory/cuda_peak_gib/{stage}" for stage in stages]
    scalars = dict(zip(names, (most / 2**30).tolist(), strict=True))
    return scalars if context.device.type == "cuda" else {names[0]: scalars[names[0]]}
