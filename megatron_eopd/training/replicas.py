"""Whether data-parallel ranks hold the same weights. In: the student. Out: nothing, or ReplicaError
on every rank.

Each update gives all ranks what one of them computed, so their weights are equal to the bit, on
GPUs too. They are not when memory or a link has changed one. Tensor-parallel ranks compute what
they share each by itself, and are not compared: on a GPU they may differ by rounding.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_eopd.errors import ReplicaError
from megatron_eopd.parallel.collectives import gather_everywhere
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.training.optimizer import Trainable


def check_replicas(student: Trainable, context: ParallelContext) -> None:
    """Two all-gathers of a few integers (dense weights, experts), one all-reduce over all ranks.

    Raises:
        ReplicaError: on every rank, with the ranks and the first weight that differs.
    """
    buffers = [b for chunk in student.wrapped for b in chunk.buffers]
    experts = [b for chunk in student.wrapped for b in chunk.expert_parallel_buffers]
    differs = _differ(buffers, context.groups.dp_cp, context.device)
    differs |= _differ(experts, context.groups.expt_dp, context.device)
    count = torch.tensor(int(differs))
    dist.all_reduce(count, group=context.cpu_group)
    if count:
        raise ReplicaError(
            f"data-parallel ranks hold different weights: {_difference(student, context)}. Their "
            f"memory or a link between them is faulty. Nothing was saved since; the newest "
            f"checkpoint is from before. Start the same command again, on other machines if it "
            f"happens twice."
        )


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Modulo 2^64, of all bits: one flipped bit changes it by a power of two, which is not 0."""
    bits = tensor.detach().reshape(-1).view(torch.uint8)
    whole = bits.numel() // 8 * 8
    # A sum of int64 wraps around, and is thirty times as fast as one of int32 into int64.
    return bits[:whole].view(torch.int64).sum() + bits[whole:].sum(dtype=torch.int64)


def _differ(buffers: list, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether ranks of the group do. Each weight lies in one of Megatron's flat buffers."""
    if not buffers or dist.get_world_size(group) == 1:
        return False
    own = torch.stack([checksum(buffer.param_data) for buffer in buffers]).to(device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    return bool((torch.stack(every) != own).any())


def _difference(student: Trainable, context: ParallelContext) -> str:
    """The first weight that differs, by rank, and how many do. On every rank alike."""
    sums = [
        (number, name, _is_expert(parameter), checksum(parameter.data.clone()).item() % 2**64)
        for number, chunk in enumerate(student.chunks)
        for name, parameter in chunk.named_parameters()
    ]
    groups = context.groups
    members = {
        False: dist.get_process_group_ranks(groups.dp_cp),
        True: dist.get_process_group_ranks(groups.expt_dp),
    }
    every = gather_everywhere((members, sums), context.cpu_group)
    found = list(_differing(every))
    return f"{found[0]} and {len(found) - 1} more" if len(found) > 1 else found[0]


def _is_expert(parameter: torch.nn.Parameter) -> bool:
    """As Megatron-Core marks those whose replicas are others than the dense weights'."""
    return not getattr(parameter, "allreduce", True)


def _differing(every: list) -> Iterator[str]:
    """Of what all ranks gathered: once for each weight of each group of replicas."""
    for rank, (members, sums) in enumerate(every):
        for place, (_, name, is_expert, _) in enumerate(sums):
            ranks = members[is_expert]
            by_sum: dict[int, list[int]] = defaultdict(list)
            for other in ranks:
                by_sum[every[other][1][place][3]].append(other)
            if rank == ranks[0] and len(by_sum) > 1:
                told = (f"{value:016x} on rank(s) {r}" for value, r in by_sum.items())
                yield f"{name} has the checksum {' and '.join(told)}"
