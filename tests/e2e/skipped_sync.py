"""A training whose engine gets the weights of the first update again in every later one.

usage: torchrun … skipped_sync.py CONFIG.toml section.key=value …
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_eopd import launch, loop
from megatron_eopd.cli import run_command
from megatron_eopd.config import load_config
from megatron_eopd.rollout.engine import SyncReport
from megatron_eopd.rollout.vllm_engines import VllmEngines

update_weights = VllmEngines.update_weights
kept: list[list[torch.Tensor]] = []


def send_old_ones(
    engine: VllmEngines, version: int, probes: Sequence[Sequence[int]] = ()
) -> SyncReport:
    outlet = engine._own.outlet
    if version == 1:
        kept[:] = [[tensor.clone() for tensor in bucket] for bucket in outlet._export_buckets()]
    if version >= 2:
        outlet._export_buckets = lambda: iter(kept)
    return update_weights(engine, version, probes)


if __name__ == "__main__":
    VllmEngines.update_weights = send_old_ones
    train = partial(launch.on_every_rank, work=loop.train)
    sys.exit(run_command(lambda: load_config(Path(sys.argv[1]), sys.argv[2:]), train))
