"""A training whose engine misses every update from the second on, and believes that it had them.

usage: torchrun … skipped_sync.py CONFIG.toml section.key=value …
"""

import sys
from functools import partial
from pathlib import Path

from megatron_eopd import launch, loop
from megatron_eopd.cli import run_command
from megatron_eopd.config import load_config
from megatron_eopd.rollout.engine import SyncReport
from megatron_eopd.rollout.vllm_engine import VllmEngine

update_weights = VllmEngine.update_weights


def skip_updates(engine: VllmEngine, version: int) -> SyncReport:
    return SyncReport(version, 0.0, 0) if version >= 2 else update_weights(engine, version)


if __name__ == "__main__":
    VllmEngine.update_weights = skip_updates
    train = partial(launch.on_every_rank, work=loop.train)
    sys.exit(run_command(lambda: load_config(Path(sys.argv[1]), sys.argv[2:]), train))
