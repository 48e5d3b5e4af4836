"""One optimizer step. In: MicroBatches. Out: StepReport, the same on every rank.

Loss and gradient are sums over tokens, divided by the number of valid tokens of all microbatches
and data-parallel ranks: how tokens were packed never changes a step.
"""
# Shapes: S tokens of a microbatch on this rank, H hidden size.

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from megatron_eopd.metrics.means import Means, Reduced
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.pipeline import hidden_states, map_hidden, run_schedule
from megatron_eopd.records import MicroBatch, StepFault, StepReport
from megatron_eopd.schedules import START, Progress
from megatron_eopd.tokens.notes import TokenNotes
from megatron_eopd.training.guards import gradient_fault, spike_fault, weight_fault
from megatron_eopd.training.optimizer import Trainable
from megatron_eopd.training.replicas import check_replicas
from megatron_eopd.training.token_loss import StepSettings, TokenLoss


def train_step(
    student: Trainable,
    token_loss: TokenLoss,
    rounds: Iterable[Sequence[MicroBatch]],
    context: ParallelContext,
    *,
    num_rounds: int,
    progress: Progress,
    compare_engine: bool = False,
    diagnose: bool = False,
    compare_replicas: bool = False,
    skip_above: float | None = None,
    notes: TokenNotes | None = None,
    around_update: AbstractContextManager[None] | None = None,
) -> StepReport:
    """Forward, backward, clip, step, over this rank's microbatches. A step with a fault is not
    taken; only the fault of the update itself comes when it was.

    `rounds`: `num_rounds` portions of the microbatches, each taken when the one before is done.
    `progress`: of the run before this step. `compare_engine`, `diagnose`: see StepSettings.
    `skip_above`: a bound of the gradient norm. `notes`: where signals of some tokens are taken
    down. `around_update`: entered where the weights change.

    Raises:
        ReplicaError: on every rank, where `compare_replicas` asks for the comparison.
    """
    means = accumulate_gradients(
        student,
        token_loss,
        rounds,
        context,
        num_rounds=num_rounds,
        progress=progress,
        compare_engine=compare_engine,
        diagnose=diagnose,
        notes=notes,
    )
    shared = share_from_last_stage(means, context)
    if compare_replicas:
        # Here, and not after the update: that heals the replicas, and not the gradient.
        check_replicas(student, context)
    lr = student.set_lr(progress)
    fault = gradient_fault(student, shared, context) or spike_fault(student, skip_above, context)
    if fault is not None:
        return skipped_report(fault, lr, shared)
    with around_update or nullcontext():
        _, grad_norm, _ = student.optimizer.step()
    fault = weight_fault(student, lr, float(grad_norm), context)
    return StepReport(float(grad_norm), lr, shared.sums, shared.histograms, fault)


def skipped_report(fault: StepFault, lr: float, shared: Reduced) -> StepReport:
    """Of a step that was not taken. Its figures join no mean unless they are sound."""
    if fault.kind == "gradient":
        return StepReport(math.nan, lr, {}, {}, fault)
    return StepReport(fault.figures["grad_norm"], lr, shared.sums, shared.histograms, fault)


def accumulate_gradients(
    student: Trainable,
    token_loss: TokenLoss,
    rounds: Iterable[Sequence[MicroBatch]],
    context: ParallelContext,
    *,
    num_rounds: int,
    progress: Progress,
    compare_engine: bool,
    diagnose: bool = False,
    notes: TokenNotes | None = None,
    force_all_reduce: bool = False,
) -> Means:
    """The gradient of the mean loss over all valid tokens, in the student's gradient buffers.

    Each data-parallel rank then holds the part that its part of the optimizer needs; the whole one
    with `force_all_reduce`, Megatron's word for it.
    """
    means = Means()
    for chunk in student.wrapped:
        chunk.zero_grad_buffer()
    student.optimizer.zero_grad()
    num_tokens = 0
    remaining = iter(rounds)
    for number in range(num_rounds):
        microbatches = next(remaining)
        settings = token_loss.settings(
            microbatches, progress, compare_engine, diagnose=diagnose, notes=notes
        )
        with student.accumulating(is_last=number == num_rounds - 1):
            _run_round(student, token_loss, microbatches, means, settings, context)
        num_tokens += sum(batch.num_valid_tokens for batch in microbatches)
        del microbatches  # while the next ones are scored, the payloads of these must be gone
    finalize_model_grads(
        student.wrapped, pg_collection=context.groups, force_all_reduce=force_all_reduce
    )
    # Loss and gradient are sums up to here; this divides once, by the tokens of all ranks. Given
    # `num_tokens`, Megatron does the same, but asks the device whether there are any.
    count = torch.full((), num_tokens, dtype=torch.int, device=context.device)
    dist.all_reduce(count, group=context.groups.dp_cp)
    for chunk in student.wrapped:
        chunk.scale_gradients(1.0 / count.clamp(min=1))
    return means


def _run_round(
    student: Trainable,
    token_loss: TokenLoss,
    microbatches: Sequence[MicroBatch],
    means: Means,
    settings: StepSettings,
    context: ParallelContext,
) -> None:
    def forward_step(batches, model):
        batch = next(batches)
        return hidden_states(model, batch), partial(loss_of, batch)

    def loss_of(batch: MicroBatch, hidden_S1H: torch.Tensor):
        loss = token_loss(batch, hidden_S1H, means, settings)
        # On the host: a kernel takes a single number from there with its arguments, while a copy of
        # it to the device would wait for all that is queued.
        return loss, torch.tensor(batch.num_valid_tokens, dtype=torch.int), {}

    run_schedule(forward_step, student.wrapped, microbatches, context, forward_only=False)


@torch.no_grad()
def measure(
    token_loss: TokenLoss,
    chunks: Sequence[CausalLM],
    rounds: Iterable[Sequence[MicroBatch]],
    context: ParallelContext,
    notes: TokenNotes | None = None,
    *,
    progress: Progress = START,
    compare_engine: bool = False,
) -> Reduced:
    """The loss metrics of the batch without a step, on every rank, entropies over the position, and
    where student and teacher are apart.
    `progress`: of the run, which α and τ may depend on; evaluations of all iterations are made with
    those of the start. `notes`, `compare_engine`: as in train_step."""
    means = Means()
    for microbatches in rounds:
        settings = token_loss.settings(
            microbatches, progress, compare_engine, by_position=True, diagnose=True, notes=notes
        )

        def at_last_stage(
            batch: MicroBatch, hidden_S1H: torch.Tensor, settings: StepSettings = settings
        ) -> None:
            token_loss(batch, hidden_S1H, means, settings)

        map_hidden(chunks, microbatches, at_last_stage, context)
    return share_from_last_stage(means, context)


def share_from_last_stage(means: Means, context: ParallelContext) -> Reduced:
    """Over the data- and context-parallel ranks of the last stage, told to every rank."""
    layout = context.layout
    told: list = [None]
    if layout.is_last_stage:
        told = [means.reduce(context.groups.dp_cp)]
    dist.broadcast_object_list(told, src=layout.last_stage_leader, group=context.cpu_group)
    return told[0]
