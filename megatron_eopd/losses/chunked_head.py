"""From hidden states to the loss and its gradients, a chunk of tokens at a time.

In: last hidden states, the LM head's weight, and a function from a chunk's logits to its loss. Out:
the sum of the losses. The gradients are made on the way forward, so that no more logits than one
chunk's ever exist; the backward pass only scales them.

Where the weight has a float32 buffer of Megatron's for its gradient, `main_grad`, the products are
added to it at once, still on the way forward: nothing of its size is made beside it.
"""
# Shapes: N tokens, C of them in a chunk, H hidden size, V this rank's columns of the vocabulary.

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses.head_products import add_weight_gradient, logits_of

ChunkLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""(logits [C, V] of a chunk, which tokens these are) → sum of their losses, differentiable. It may
write over the logits in its backward pass."""


def chunk_size(objective: ObjectiveConfig, on_gpu: bool) -> int:
    """Tokens per chunk."""
    # On a GPU smaller chunks would spend their time reading the weight and its gradient.
    return objective.head_chunk_size or (4096 if on_gpu else 256)


def logits_dtype(objective: ObjectiveConfig) -> torch.dtype | None:
    """None: that of the LM head's weight."""
    return torch.float32 if objective.logits_dtype == "float32" else None


def overwrites_logits(objective: ObjectiveConfig) -> bool:
    """Whether the gradient is written over the student's logits. A chunk's are read by nobody else,
    unless an estimator sweeps them once more, or each of several teachers does."""
    is_read_again = objective.formula.needs_second_sweep
    is_read_again |= objective.teacher_mixture == "divergences"
    return objective.inplace_backward or (objective.head == "chunked" and not is_read_again)


def chunked_head_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    loss_of_chunk: ChunkLoss,
    *,
    chunk_size: int,
    tp_group: dist.ProcessGroup,
    logits_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Scalar float32: Σ over chunks of loss_of_chunk(hidden @ weightᵀ).

    `hidden_NH` is the same on all ranks of the group, `weight_VH` this rank's rows. Forward, where
    a gradient is needed: one all-reduce of [N, H] beside what the loss itself does. Backward: none.
    Megatron's LM head has that all-reduce in its backward; both sum the hidden states' gradient
    over the group exactly once.

    `logits_dtype`: the weight's by default. With a `main_grad` the gradient of the returned loss
    must be 1, because the weight's is added before it is known, and the backward pass must follow
    once: under activation recomputation it would be added twice.
    """
    main_grad_VH = getattr(weight_VH, "main_grad", None) if weight_VH.requires_grad else None
    if main_grad_VH is not None and main_grad_VH.dtype != torch.float32:
        main_grad_VH = None
    # Asked here: a Function's forward runs without gradients, and its needs_input_grad speaks of
    # the inputs alone. An evaluation must add to no buffer.
    wants_grad = torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad)
    work = _Work(chunk_size, tp_group, logits_dtype, main_grad_VH, wants_grad)
    return _ChunkedHead.apply(hidden_NH, weight_VH, loss_of_chunk, work)


class _Work(NamedTuple):
    chunk_size: int
    tp_group: dist.ProcessGroup
    logits_dtype: torch.dtype | None
    main_grad_VH: torch.Tensor | None
    wants_grad: bool


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, loss_of_chunk, work):
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        wants_grad, grad_weight_VH = work.wants_grad, work.main_grad_VH
        if wants_grad:
            grad_hidden_NH = torch.empty_like(hidden_NH)
            if grad_weight_VH is None and weight_VH.requires_grad:
                # float32: the sum over chunks would lose low bits in bfloat16.
                grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        # One chunk of no tokens where there is none: what the loss reports and agrees on with other
        # ranks must not depend on where the tokens lie.
        for first in range(0, max(len(hidden_NH), 1), work.chunk_size):
            rows = slice(first, first + work.chunk_size)
            logits_CV = logits_of(hidden_NH[rows], weight_VH, work.logits_dtype)
            logits_CV.requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                loss = loss_of_chunk(logits_CV, rows)
            total += loss.detach()
            if wants_grad:
                (grad_CV,) = torch.autograd.grad(loss, logits_CV)
                del logits_CV, loss
                # Beside float32 logits. One by one the elements lose 8 bits, and no sum of them.
                grad_CV = grad_CV.to(weight_VH.dtype)
                grad_hidden_NH[rows] = grad_CV @ weight_VH
                if grad_weight_VH is not None:
                    add_weight_gradient(grad_weight_VH, grad_CV, hidden_NH[rows])
                del grad_CV  # before the next chunk's logits come
            else:
                del logits_CV, loss
        if wants_grad:
            dist.all_reduce(grad_hidden_NH, group=work.tp_group)
            ctx.grad_hidden_NH = grad_hidden_NH
            ctx.weight_VH, ctx.has_main_grad = weight_VH, work.main_grad_VH is not None
            if not ctx.has_main_grad and grad_weight_VH is not None:
                ctx.grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return total

    @staticmethod
    def backward(ctx, g):
        grad_weight_VH = None
        if ctx.has_main_grad:
            # On a GPU no host waits for this.
            torch._assert_async(g == 1, "chunked head: the gradient of the loss is not 1")
            grad_weight_VH = _in_main_grad(ctx.weight_VH)
        elif ctx.weight_VH.requires_grad:
            grad_weight_VH = ctx.grad_weight_VH.mul_(g)
            del ctx.grad_weight_VH
        grad_hidden_NH = ctx.grad_hidden_NH.mul_(g)
        del ctx.grad_hidden_NH
        return grad_hidden_NH, grad_weight_VH, None, None


def _in_main_grad(weight: torch.Tensor) -> torch.Tensor:
    """What stands for a gradient that is in `main_grad` already, by Megatron's contract (its
    LinearWithGradAccumulationAndAsyncCommunication): the hook of its data-parallel wrapper wants to
    see a gradient, and leaves this one alone. Not so that of a weight that is an embedding's, too:
    autograd has added the embedding's gradient to it, so it must be 0, and is asked to be."""
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)
