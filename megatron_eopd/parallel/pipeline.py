"""One forward pass of a CausalLM through Megatron's pipeline schedule, for student and teacher.

The schedule wants a `forward_step` that returns the stage's output and a function to be called on
it at the last stage. `hidden_states` is that output; what becomes of it is the caller's business.
"""
# Shapes: S tokens of this rank, H hidden size.

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import MicroBatch

Result = TypeVar("Result")


def hidden_states(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """[S, 1, H]; [S/tp, 1, H] under sequence parallelism."""
    # Rotary embeddings take their positions from the packed sequences, and nothing else reads them.
    positions_1S = torch.zeros_like(batch.token_ids_1S)
    return model(
        batch.token_ids_1S, positions_1S, attention_mask=None, packed_seq_params=batch.sequences
    )


@torch.no_grad()
def map_hidden(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[MicroBatch],
    at_last_stage: Callable[[MicroBatch, torch.Tensor], Result],
    context: ParallelContext,
) -> list[Result]:
    """`at_last_stage(batch, hidden_S1H)` of every microbatch, on the last stage; else []."""

    def forward_step(batches, model):
        batch = next(batches)
        return hidden_states(model, batch), partial(result_of, batch)

    def result_of(batch: MicroBatch, hidden: torch.Tensor, non_loss_data: bool) -> Result:
        return at_last_stage(batch, hidden)

    return run_schedule(
        forward_step, chunks, microbatches, context, forward_only=True, collect_non_loss_data=True
    )


def run_schedule(
    forward_step: Callable,
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[MicroBatch],
    context: ParallelContext,
    **options: bool,
) -> list:
    """Megatron's schedule for this layout, over the given microbatches."""
    layout, groups = context.layout, context.groups
    run = get_forward_backward_func(
        pp_size=layout.pp, vp_size=layout.vpp if layout.vpp > 1 else None
    )
    pipeline = {}
    if layout.pp > 1:
        pipeline["p2p_communicator"] = P2PCommunicator(groups.pp, get_model_config(chunks[0]))
    return run(
        forward_step_func=forward_step,
        # Each chunk of a stage reads all microbatches.
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        # Of whole rows, before context parallelism cut them. Only interleaved chunks use it: other
        # stages tell each other the length of every microbatch.
        seq_length=microbatches[0].token_ids_1S.shape[1] * layout.cp,
        micro_batch_size=1,
        pg_collection=groups,
        **pipeline,
        **options,
    )
