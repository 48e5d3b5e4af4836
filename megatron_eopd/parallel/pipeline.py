"""One forward pass of a CausalLM through Megatron's pipeline schedule, for student and teacher.

The schedule wants a `forward_step` that returns the stage's output and a function to be called on
it at the last stage. `hidden_states` is that output; what becomes of it is the caller's business.
"""
# Shapes: S tokens of this rank, H hidden size.

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig
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
        config = get_model_config(chunks[0])
        pipeline["p2p_communicator"] = _KnownShapes(groups.pp, config, microbatches)
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


class _KnownShapes(P2PCommunicator):
    """Megatron's stages tell each other how long the next microbatch is, which costs a message and
    a wait for the device each time, both ways. Here every stage has all microbatches itself.

    Both supported lines of Megatron-Core ask this one method, and microbatches pass in order.
    """

    def __init__(
        self, group: dist.ProcessGroup, config: TransformerConfig, batches: Sequence[MicroBatch]
    ) -> None:
        super().__init__(group, config)
        parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shapes = [
            [batch.token_ids_1S.shape[1] // parts, 1, config.hidden_size] for batch in batches
        ]
        self._activations, self._gradients = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int] | None, list[int] | None]:
        return (
            next(self._activations) if recv_prev else None,
            next(self._gradients) if recv_next else None,
        )
