"""One optimizer step. In: MicroBatches. Out: StepReport, the same on every rank.

Loss and gradient are sums over tokens, divided by the number of valid tokens of all microbatches
and data-parallel ranks: how tokens were packed never changes a step.
"""
# Shapes: S tokens, B sequences, H hidden size, N valid response tokens of a microbatch.

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from megatron_eopd.losses.vocab_parallel import describe_non_finite
from megatron_eopd.metrics import Means, Reduced
from megatron_eopd.models.build import CausalLM
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import MicroBatch, StepReport
from megatron_eopd.training.forward import hidden_states, map_hidden, run_schedule
from megatron_eopd.training.optimizer import Trainable
from megatron_eopd.training.token_loss import NON_FINITE, TokenLoss


class NonFiniteError(RuntimeError):
    """Loss or gradient is NaN or infinite. Raised on every rank, before the weights change."""


def train_step(
    student: Trainable,
    token_loss: TokenLoss,
    microbatches: Sequence[MicroBatch],
    context: ParallelContext,
    *,
    step: int,
    compare_engine: bool = False,
) -> StepReport:
    """Forward, backward, clip, step, over this rank's microbatches.

    `step` counts the optimizer steps of the run before this one. `compare_engine`: see
    StepSettings.

    Raises:
        NonFiniteError: on every rank, with the weights as they were before the step.
    """
    means = Means()
    settings = token_loss.settings(microbatches, step, compare_engine)
    student.wrapped.zero_grad_buffer()
    student.optimizer.zero_grad()

    def forward_step(batches, model):
        batch = next(batches)
        return hidden_states(model, batch.token_ids_BS), partial(loss_of, batch)

    def loss_of(batch: MicroBatch, hidden_SBH: torch.Tensor):
        loss = token_loss(batch, hidden_SBH, means, settings)
        # Megatron sums loss and count over microbatches and ranks, and divides once.
        count = torch.tensor(batch.num_valid_tokens, dtype=torch.int, device=loss.device)
        return loss, count, {}

    run_schedule(forward_step, student.wrapped, microbatches, context, forward_only=False)
    lr = student.lr
    shared = share_from_last_stage(means, context)
    _refuse_non_finite(student, shared, context)
    _, grad_norm, _ = student.optimizer.step()
    student.scheduler.step(increment=1)
    return StepReport(float(grad_norm), lr, shared.sums, shared.values)


@torch.no_grad()
def measure(
    token_loss: TokenLoss,
    model: CausalLM,
    microbatches: Sequence[MicroBatch],
    context: ParallelContext,
) -> Reduced:
    """The loss metrics of the batch without a step, on every rank; α and τ as at the start."""
    means = Means()
    settings = token_loss.settings(microbatches, step=0, compare_engine=False)

    def at_last_stage(batch: MicroBatch, hidden_SBH: torch.Tensor) -> None:
        token_loss(batch, hidden_SBH, means, settings)

    map_hidden(model, microbatches, at_last_stage, context)
    return share_from_last_stage(means, context)


def share_from_last_stage(means: Means, context: ParallelContext) -> Reduced:
    """Over the data-parallel ranks of the last stage, told to every rank."""
    layout = context.layout
    told: list = [None]
    if layout.is_last_stage:
        told = [means.reduce(context.groups.dp)]
    dist.broadcast_object_list(told, src=layout.last_stage_leader, group=context.cpu_group)
    return told[0]


def _refuse_non_finite(student: Trainable, shared: Reduced, context: ParallelContext) -> None:
    """One number per rank decides for all: NaN and infinity survive a sum."""
    total = torch.stack([b.grad_data.sum() for b in student.wrapped.buffers]).sum().double()
    # cpu_group, whatever the device: all ranks, also those of other stages, must decide alike.
    total = total.cpu()
    dist.all_reduce(total, group=context.cpu_group)
    loss = shared.sums["loss/total"][0]
    logits = describe_non_finite(torch.tensor(shared.tallies[NON_FINITE]))
    if logits or not (math.isfinite(loss) and math.isfinite(total.item())):
        raise NonFiniteError(
            f"loss={loss}, sum of gradients={total.item()}: not finite. {logits} The weights were "
            f"not changed. Look at the rollouts of this iteration, lower training.lr or "
            f"training.clip_grad, or start again from an earlier checkpoint."
        )
