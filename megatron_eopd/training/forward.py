"""One forward pass of a CausalLM through Megatron's pipeline schedule, for student and teacher.

The schedule wants a `forward_step` that returns the stage's output and a function to be called on
it at the last stage. `hidden_states` is that output; what becomes of it is the caller's business.
"""
# Shapes: B sequences, S padded length, H hidden size.

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_eopd.models.build import CausalLM
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import MicroBatch

Result = TypeVar("Result")


def hidden_states(model: torch.nn.Module, token_ids_BS: torch.Tensor) -> torch.Tensor:
    """[S, B, H]; [S/tp, B, H] under sequence parallelism."""
    positions_BS = torch.arange(token_ids_BS.shape[1], device=token_ids_BS.device)
    # No mask: attention is causal, and padding sits on the right.
    return model(token_ids_BS, positions_BS.expand_as(token_ids_BS), attention_mask=None)


@torch.no_grad()
def map_hidden(
    model: CausalLM,
    microbatches: Sequence[MicroBatch],
    at_last_stage: Callable[[MicroBatch, torch.Tensor], Result],
    context: ParallelContext,
) -> list[Result]:
    """`at_last_stage(batch, hidden_SBH)` of every microbatch, on the last stage; else []."""

    def forward_step(batches, model):
        batch = next(batches)
        return hidden_states(model, batch.token_ids_BS), partial(result_of, batch)

    def result_of(batch: MicroBatch, hidden: torch.Tensor, non_loss_data: bool) -> Result:
        return at_last_stage(batch, hidden)

    return run_schedule(
        forward_step, model, microbatches, context, forward_only=True, collect_non_loss_data=True
    )


def run_schedule(
    forward_step: Callable,
    model: torch.nn.Module,
    microbatches: Sequence[MicroBatch],
    context: ParallelContext,
    **options: bool,
) -> list:
    """Megatron's schedule for this layout, over the given microbatches."""
    micro_batch_size, seq_length = microbatches[0].token_ids_BS.shape
    run = get_forward_backward_func()
    return run(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[model],
        num_microbatches=len(microbatches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        **options,
    )
