"""Real gloo ranks for a test: forked, so that nobody pays for importing torch again.

Fork needs a parent that runs no engine and no thread pool, so the tests that use this live in
tests/distributed/ and run as a pytest process of their own.
"""

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_eopd.config import ParallelConfig
from megatron_eopd.parallel.init import ParallelContext, choose_device, join_groups, leave_groups
from megatron_eopd.parallel.layout import Layout


def run_ranks(
    world_size: int, tmp_path: Path, check: Callable, *args, timeout_s: float = 60
) -> None:
    """Run `check(*args)` in `world_size` processes joined by torch.distributed (gloo)."""
    rendezvous = tmp_path / f"rendezvous-{len(list(tmp_path.iterdir()))}"
    start_ranks(world_size, _rank_main, world_size, rendezvous, check, args, timeout_s)


def start_ranks(world_size: int, main: Callable, *args) -> None:
    """Run `main(rank, *args)` in `world_size` processes; they join, if they do, by themselves."""
    mp.start_processes(_alone, (main, args), nprocs=world_size, start_method="fork")


def _alone(rank: int, main: Callable, args: tuple) -> None:
    """On one thread: OpenMP's others do not survive a fork, and a team would wait for them."""
    torch.set_num_threads(1)
    main(rank, *args)


def _rank_main(
    rank: int, world_size: int, rendezvous: Path, check: Callable, args: tuple, timeout_s: float
) -> None:
    choose_device()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        check(*args)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def context_for(
    tp: int,
    pp: int,
    ep: int = 1,
    expert_tp: int = 1,
    *,
    cp: int = 1,
    vpp: int = 1,
    layers: tuple[int | None, int | None] = (None, None),
    sequence_parallel: bool = False,
) -> ParallelContext:
    """Megatron groups over the ranks of this launch; call `leave_groups` before the next one.

    `layers`: of the first and of the last pipeline stage.
    """
    config = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=expert_tp,
        sequence_parallel=sequence_parallel,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vpp,
        decoder_first_pipeline_num_layers=layers[0],
        decoder_last_pipeline_num_layers=layers[1],
        distributed_timeout_minutes=1,
    )
    layout = Layout.from_config(config, dist.get_world_size(), dist.get_rank())
    return join_groups(layout, torch.device("cpu"), timeout_minutes=1, seed=1)


__all__ = ["context_for", "leave_groups", "run_ranks", "start_ranks"]
