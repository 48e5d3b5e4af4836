"""What makes an optimizer step unfit to be taken, or to be kept. In: gradients and weights. Out: a
StepFault or None, the same on every rank.

One number per rank decides for all: NaN and infinity survive a sum.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from megatron_eopd.losses.vocab_parallel import describe_non_finite
from megatron_eopd.metrics.means import Reduced
from megatron_eopd.parallel.collectives import from_rank_zero, gather_everywhere
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import StepFault
from megatron_eopd.training.optimizer import Trainable
from megatron_eopd.training.token_loss import NON_FINITE

NAMES_PER_RANK = 8
"""Parameters that a fault names, the first ones: NaN spreads to all others."""


def gradient_fault(
    student: Trainable, shared: Reduced, context: ParallelContext
) -> StepFault | None:
    """Loss, logits or gradient are not finite. Before the update."""
    buffers = [b for c in student.wrapped for b in (*c.buffers, *c.expert_parallel_buffers)]
    total = _sum_of_all([buffer.grad_data for buffer in buffers], context)
    loss = shared.sums["loss/total"][0]
    logits = describe_non_finite(torch.tensor(shared.tallies[NON_FINITE]))
    if not logits and math.isfinite(loss) and math.isfinite(total):
        return None
    message = (
        f"loss={loss}, sum of gradients={total}: not finite. {logits} The weights were not changed."
    )
    names = _non_finite_names(student, lambda p: p.main_grad, context)
    figures = {"logits": logits, "not_finite": names, "sums_and_counts": shared.sums}
    return StepFault("gradient", message, figures)


def spike_fault(
    student: Trainable, skip_above: float | None, context: ParallelContext
) -> StepFault | None:
    """The gradient norm is above the bound; None is no bound. Before the update.

    Megatron-Core clips and updates in one call, which measures the norm once more, to the same bit.
    """
    if skip_above is None:
        return None
    student.optimizer.prepare_grads()
    own = float(student.optimizer.get_grad_norm())
    norm = from_rank_zero(lambda: own, context.cpu_group)
    if norm <= skip_above:
        return None
    message = (
        f"the gradient norm is {norm:g}, and that of a step that is taken is at most "
        f"{skip_above:g} here: training.skip_grad_norm_factor times the median of the last steps. "
        f"The weights were not changed."
    )
    return StepFault("spike", message, {"grad_norm": norm, "skip_above": skip_above})


def weight_fault(
    student: Trainable, lr: float, grad_norm: float, context: ParallelContext
) -> StepFault | None:
    """A finite gradient can still make an update that overflows, and a checkpoint of that would be
    the newest. With `overlap_param_gather` each part is seen by the rank that updates it."""
    weights = [p.data for chunk in student.chunks for p in chunk.parameters()]
    if math.isfinite(_sum_of_all(weights, context)):
        return None
    message = (
        f"the update made weights that are not finite (training.lr={lr:g}, gradient norm "
        f"{grad_norm:g}). They are not saved."
    )
    names = _non_finite_names(student, lambda p: p.data, context)
    return StepFault("weights", message, {"not_finite": names})


def _sum_of_all(tensors: Iterable[torch.Tensor], context: ParallelContext) -> float:
    total = torch.zeros((), dtype=torch.float64, device=context.device)
    for tensor in tensors:
        total += tensor.sum(dtype=torch.float32)
    # cpu_group, whatever the device: all ranks, also those of other stages, must decide alike.
    total = total.cpu()
    dist.all_reduce(total, group=context.cpu_group)
    return total.item()


def _non_finite_names(
    student: Trainable,
    tensor_of: Callable[[torch.nn.Parameter], torch.Tensor],
    context: ParallelContext,
) -> dict[str, Any]:
    """Rank and place → its first parameters whose tensor is not finite. One all-gather."""
    own = [
        name
        for chunk in student.chunks
        for name, parameter in chunk.named_parameters()
        if not tensor_of(parameter).isfinite().all()
    ]
    where = f"rank {context.layout.rank} ({context.layout.place()})"
    every = gather_everywhere((where, own[:NAMES_PER_RANK]), context.cpu_group)
    return {where: names for where, names in every if names}
