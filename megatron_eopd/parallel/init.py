"""Process groups of a run, made once. The ONE place that sets or reads Megatron's global state.

Everything else receives a ParallelContext, or a single group out of it, as an argument.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_eopd.config import ParallelConfig
from megatron_eopd.parallel.cpu import emulate_cuda
from megatron_eopd.parallel.layout import Layout


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place, its device, and the groups it shares with others."""

    layout: Layout
    device: torch.device
    groups: ProcessGroupCollection
    """Megatron-Core's groups: tp, pp, dp, dp_cp, embd, tp_ep (the experts of one stage), …"""
    cpu_group: dist.ProcessGroup
    """All ranks, over gloo: Python objects and errors travel here, whatever the device."""


@contextmanager
def parallel_context(
    config: ParallelConfig, seed: int, longest_wait_s: float
) -> Iterator[ParallelContext]:
    """Join the ranks that torchrun started (or run alone without torchrun), and leave them again.

    longest_wait_s: how long ranks may wait for what one of them does alone, e.g. its engine.

    Raises:
        ConfigError: the layout does not fit the world size; before any group exists.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    layout = Layout.from_config(config, world_size, rank)
    device = choose_device()
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method="env://" if "MASTER_ADDR" in os.environ else f"tcp://127.0.0.1:{free_port()}",
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    try:
        yield join_groups(config, layout, device, seed, longest_wait_s)
        leave_groups()
    finally:
        dist.destroy_process_group()


def join_groups(
    config: ParallelConfig,
    layout: Layout,
    device: torch.device,
    seed: int,
    longest_wait_s: float = 0.0,
) -> ParallelContext:
    """Build Megatron's groups on top of an initialised torch.distributed."""
    minutes = config.distributed_timeout_minutes
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        distributed_timeout_minutes=minutes,
    )
    model_parallel_cuda_manual_seed(seed)
    context = ParallelContext(
        layout=layout,
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        cpu_group=dist.new_group(
            backend="gloo", timeout=timedelta(minutes=minutes, seconds=longest_wait_s)
        ),
    )
    assert dist.get_rank(context.groups.tp) == layout.tp_rank, "Megatron's rank order changed"
    assert dist.get_rank(context.groups.dp) == layout.dp_rank, "Megatron's rank order changed"
    assert dist.get_rank(context.groups.pp) == layout.pp_rank, "Megatron's rank order changed"
    assert dist.get_rank(context.groups.ep) == layout.ep_rank, "Megatron's rank order changed"
    return context


def regroup(config: ParallelConfig, context: ParallelContext) -> ParallelContext:
    """Another layout of the same ranks; the groups of the context given are gone.

    Raises:
        ConfigError: the layout does not fit the world size.
    """
    layout = Layout.from_config(config, context.layout.world_size, context.layout.rank)
    leave_groups()
    return join_groups(config, layout, context.device, seed=0)


def leave_groups() -> None:
    """Undo `join_groups`; another layout may follow on the same ranks."""
    parallel_state.destroy_model_parallel()


def choose_device() -> torch.device:
    """This rank's GPU; or the CPU, with CUDA emulated for Megatron-Core."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    emulate_cuda()
    return torch.device("cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
