"""From hidden states to the loss and its gradients, a chunk of tokens at a time.

In: last hidden states, the LM head's weight, and a function from a chunk's logits to its loss. Out:
the sum of the losses. The gradients are made on the way forward, so that no more logits than one
chunk's ever exist; the backward pass only scales them.
"""
# Shapes: N tokens, C of them in a chunk, H hidden size, V this rank's columns of the vocabulary.

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_eopd.config import ObjectiveConfig

ChunkLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""(logits [C, V] of a chunk, which tokens these are) → sum of their losses, differentiable. It may
write over the logits in its backward pass."""


def chunk_size(objective: ObjectiveConfig, on_gpu: bool) -> int:
    """Tokens per chunk."""
    # On a GPU smaller chunks would spend their time on the weight gradient's float32 sum.
    return objective.head_chunk_size or (4096 if on_gpu else 256)


def overwrites_logits(objective: ObjectiveConfig) -> bool:
    """Whether the gradient is written over the student's logits. A chunk's are read by nobody else,
    unless an estimator sweeps them once more."""
    is_chunked = objective.head == "chunked"
    return objective.inplace_backward or (is_chunked and not objective.formula.needs_second_sweep)


def chunked_head_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    loss_of_chunk: ChunkLoss,
    *,
    chunk_size: int,
    tp_group: dist.ProcessGroup,
) -> torch.Tensor:
    """Scalar float32: Σ over chunks of loss_of_chunk(hidden @ weightᵀ).

    `hidden_NH` is the same on all ranks of the group, `weight_VH` this rank's rows. Forward, where
    a gradient is needed: one all-reduce of [N, H] beside what the loss itself does. Backward: none.
    Megatron's LM head has that all-reduce in its backward; both sum the hidden states' gradient
    over the group exactly once.
    """
    return _ChunkedHead.apply(hidden_NH, weight_VH, loss_of_chunk, chunk_size, tp_group)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, loss_of_chunk, chunk_size, tp_group):
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        wants_grad = any(ctx.needs_input_grad[:2])
        if wants_grad:
            grad_hidden_NH = torch.empty_like(hidden_NH)
            # float32: the sum over chunks would lose low bits in bfloat16.
            grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        # One chunk of no tokens where there is none: what the loss reports and agrees on with other
        # ranks must not depend on where the tokens lie.
        for first in range(0, max(len(hidden_NH), 1), chunk_size):
            rows = slice(first, first + chunk_size)
            logits_CV = (hidden_NH[rows] @ weight_VH.T).requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                loss = loss_of_chunk(logits_CV, rows)
            total += loss.detach()
            if wants_grad:
                (grad_CV,) = torch.autograd.grad(loss, logits_CV)
                grad_hidden_NH[rows] = grad_CV @ weight_VH
                _add_product(grad_weight_VH, grad_CV.T, hidden_NH[rows])
                del grad_CV
            del logits_CV, loss  # before the next chunk's logits come
        if wants_grad:
            dist.all_reduce(grad_hidden_NH, group=tp_group)
            ctx.gradients = (grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype))
        return total

    @staticmethod
    def backward(ctx, g):
        grad_hidden_NH, grad_weight_VH = ctx.gradients
        del ctx.gradients
        return grad_hidden_NH.mul_(g), grad_weight_VH.mul_(g), None, None, None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
