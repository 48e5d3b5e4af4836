"""Peak memory is told of the rank that has most."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_eopd.reporting.scalars import memory_scalars
from tests.ranks import run_ranks

GIB = 2**30
PEAKS = [{"": 1 * GIB, "score": 5 * GIB, "train": 3 * GIB}, {"": 0, "score": 2 * GIB, "train": GIB}]


def check_peaks() -> None:
    rank = dist.get_rank()
    for device in ("cuda", "cpu"):
        context = SimpleNamespace(cpu_group=dist.group.WORLD, device=torch.device(device))
        found = memory_scalars(PEAKS[1 - rank], context)
        assert 0.05 < found.pop("memory/host_peak_gib") < 50
        stages = {"": 5.0, "/score": 5.0, "/train": 3.0} if device == "cuda" else {}
        assert found == {f"memory/cuda_peak_gib{s}": pytest.approx(v) for s, v in stages.items()}


def test_peaks_of_stages_and_iteration_are_those_of_the_fullest_rank(tmp_path):
    """On every rank alike; of a CPU, whose allocations nobody counts, the process alone."""
    run_ranks(2, tmp_path, check_peaks)
