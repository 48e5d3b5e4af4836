"""Process groups of a run, made once. The ONE place that sets or reads Megatron's global state.

Everything else receives a ParallelContext, or a single group out of it, as an argument.
"""

import os
import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_eopd.config import ParallelConfig
from megatron_eopd.errors import ConfigError
from megatron_eopd.parallel.cpu import emulate_cuda
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.meeting import fresh_part, require_torchrun
from megatron_eopd.parallel.processes import die_with_torchrun, forks_die_with_their_parents


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place, its device, and the groups it shares with others."""

    layout: Layout
    device: torch.device
    groups: ProcessGroupCollection
    """Megatron-Core's groups: tp, pp, cp, dp, dp_cp, embd, tp_ep (the experts of one stage), …"""
    cpu_group: dist.ProcessGroup
    """All ranks, over gloo: Python objects and errors travel here, whatever the device."""


def own_rank() -> tuple[int, int]:
    """(rank, world size) in the job that torchrun started; alone without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def leave_no_process_behind() -> None:
    """By a rank, before it starts any process: neither it nor what it starts outlives torchrun.

    Raises:
        LostRankError: torchrun has ended already.
    """
    die_with_torchrun()
    require_torchrun()
    forks_die_with_their_parents()


def choose_deterministic_kernels() -> None:
    """For the whole process, before it uses a GPU. An operation that has no deterministic kernel
    raises and names itself."""
    settings = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # docs.pytorch.org/docs/stable/notes/randomness
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # TransformerEngine's attention
        "NCCL_ALGO": "^NVLS",  # as Megatron-LM's --deterministic-mode asks
    }
    if torch.cuda.is_available():  # its kernels for that are Triton's
        settings["VLLM_BATCH_INVARIANT"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # It would also fill all fresh memory, to make reads of what nobody wrote alike.
    torch.utils.deterministic.fill_uninitialized_memory = False


def job_store(timeout_minutes: float) -> dist.Store:
    """The store that all ranks of the job share, empty. Returns when all have come.

    Raises:
        LostRankError: naming those that have not.
    """
    rank, world_size = own_rank()
    url = "env://" if "MASTER_ADDR" in os.environ else f"tcp://127.0.0.1:{free_port()}"
    timeout = timedelta(minutes=timeout_minutes)
    store, _, _ = next(dist.rendezvous(url, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return fresh_part(store, rank, world_size, timeout)


@contextmanager
def parallel_context(
    config: ParallelConfig, seed: int, longest_wait_s: float
) -> Iterator[ParallelContext]:
    """Join all ranks of the job, and leave them again.

    Raises:
        ConfigError: the layout does not fit the world size; before any group exists.
    """
    leave_no_process_behind()
    rank, world_size = own_rank()
    layout = Layout.from_config(config, world_size, rank)
    minutes = config.distributed_timeout_minutes
    with world_context(layout, job_store(minutes), minutes, seed, longest_wait_s) as context:
        yield context


@contextmanager
def world_context(
    layout: Layout, store: dist.Store, timeout_minutes: float, seed: int, longest_wait_s: float
) -> Iterator[ParallelContext]:
    """Join the ranks of a layout, which have `store` for themselves, and leave them again.

    longest_wait_s: how long ranks may wait for what one of them does alone, e.g. its engine.
    """
    device = choose_device()
    # Nothing draws from these, here at least: what is random has a seed of its own, of the run's
    # seed and the iteration. Set, they are the same in every run all the same.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=layout.rank,
        world_size=layout.world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )
    try:
        yield join_groups(layout, device, timeout_minutes, seed, longest_wait_s)
        leave_groups()
    finally:
        dist.destroy_process_group()


def join_groups(
    layout: Layout,
    device: torch.device,
    timeout_minutes: float,
    seed: int,
    longest_wait_s: float = 0.0,
) -> ParallelContext:
    """Build Megatron's groups on top of an initialised torch.distributed."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        distributed_timeout_minutes=timeout_minutes,
    )
    model_parallel_cuda_manual_seed(seed)
    context = ParallelContext(
        layout=layout,
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        cpu_group=dist.new_group(
            backend="gloo",
            timeout=timedelta(minutes=timeout_minutes, seconds=longest_wait_s),
            group_desc="CPU_GROUP",
        ),
    )
    for name in ("tp", "cp", "dp", "pp", "ep"):
        own, rank = getattr(layout, f"{name}_rank"), dist.get_rank(getattr(context.groups, name))
        assert rank == own, f"Megatron's rank order changed: {name} rank {rank}, expected {own}"
    return context


def another_cpu_group(timeout_minutes: float) -> dist.ProcessGroup:
    """All ranks, over gloo, for what runs beside the training. Collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def second_layout(layout: Layout, timeout: timedelta, context: ParallelContext) -> ParallelContext:
    """Another model's layout on the same ranks, beside the first: groups and no global state.

    The model must not be trained and has no context parallelism: groups for that are not made.
    """
    assert layout.cp == 1, layout
    dense = HyperCommGrid([layout.tp, 1, layout.dp, layout.pp], ["tp", "cp", "dp", "pp"])
    expert_dp = layout.stage_size // (layout.ep * layout.expert_tp)
    experts = HyperCommGrid(
        [layout.expert_tp, layout.ep, expert_dp, layout.pp], ["tp", "ep", "dp", "pp"]
    )
    tp, cp, dp, pp, stage = (
        dense.create_pg(dims, timeout=timeout)
        for dims in ("tp", "cp", "dp", "pp", ["tp", "cp", "dp"])
    )
    expt_tp, ep, expt_dp, tp_ep = (
        experts.create_pg(dims, timeout=timeout) for dims in ("tp", "ep", "dp", ["tp", "ep"])
    )
    groups = ProcessGroupCollection(
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        tp_cp=tp,
        dp_cp=dp,
        tp_dp_cp=stage,
        expt_tp=expt_tp,
        ep=ep,
        expt_dp=expt_dp,
        tp_ep=tp_ep,
        # Only training keeps tied embeddings of two stages alike.
        embd=None,
        pos_embd=None,
    )
    return ParallelContext(layout, context.device, groups, context.cpu_group)


def regroup(config: ParallelConfig, context: ParallelContext) -> ParallelContext:
    """Another layout of the same ranks; the groups of the context given are gone.

    Raises:
        ConfigError: the layout does not fit the world size.
    """
    layout = Layout.from_config(config, context.layout.world_size, context.layout.rank)
    leave_groups()
    return join_groups(layout, context.device, config.distributed_timeout_minutes, seed=0)


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


def own_gpu() -> str:
    """The name of this rank's GPU, the same in every process that sees it; empty without one.

    Raises:
        ConfigError: its host shows fewer GPUs than it has ranks.
    """
    if not torch.cuda.is_available():
        return ""
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise ConfigError(
            f"local rank {index} needs a GPU of its own, and this host shows {count} "
            f"(CUDA_VISIBLE_DEVICES={visible}). Start torchrun with --nproc_per_node={count} or "
            f"less, or show it more GPUs."
        )
    return str(torch.cuda.get_device_properties(index).uuid)


def check_gpus(gpus: Sequence[str]) -> None:
    """`gpus`: of every rank of the job, as `own_gpu` names them.

    Raises:
        ConfigError: two ranks, or what sits on them, would share one.
    """
    for rank, gpu in enumerate(gpus):
        if gpu and gpu in gpus[:rank]:
            raise ConfigError(
                f"ranks {gpus.index(gpu)} and {rank} have the same GPU, {gpu}: the devices that "
                f"they see overlap. Have torchrun see all GPUs of a host, and set "
                f"CUDA_VISIBLE_DEVICES for it alone and not for its ranks."
            )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
