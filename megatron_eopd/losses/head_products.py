"""The matrix products of an LM head. In: hidden states, a weight, a gradient of logits, in the
model's dtype. Out: products that are rounded once, at most, behind a sum in float32.

PyTorch multiplies bfloat16 into float32 on CUDA only. On a CPU the operands are cast instead, a
block of the vocabulary at a time, so that no float32 copy of a weight ever exists.
"""
# Shapes: N tokens, H hidden size, V this rank's columns of the vocabulary.

import torch
import torch.nn.functional as F

BLOCK = 8192
"""Columns of the vocabulary in a block."""


def logits_of(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """[N, V] in `dtype`: that of the weight, by default, or float32."""
    if dtype is None or dtype == weight_VH.dtype:
        return F.linear(hidden_NH, weight_VH)
    if hidden_NH.is_cuda:
        return torch.mm(hidden_NH, weight_VH.T, out_dtype=dtype)
    logits_NV = hidden_NH.new_empty(len(hidden_NH), len(weight_VH), dtype=dtype)
    for block in _blocks(len(weight_VH)):
        logits_NV[:, block] = hidden_NH.to(dtype) @ weight_VH[block].to(dtype).T
    return logits_NV


def add_weight_gradient(
    total_VH: torch.Tensor, grad_NV: torch.Tensor, hidden_NH: torch.Tensor
) -> None:
    """total += gradᵀ @ hidden, where the total is float32 and the others of one dtype."""
    if grad_NV.dtype == total_VH.dtype:
        total_VH.addmm_(grad_NV.T, hidden_NH)
    elif grad_NV.is_cuda:
        torch.addmm(total_VH, grad_NV.T, hidden_NH, out_dtype=total_VH.dtype, out=total_VH)
    else:
        hidden_NH = hidden_NH.to(total_VH.dtype)
        for block in _blocks(len(total_VH)):
            total_VH[block].addmm_(grad_NV[:, block].to(total_VH.dtype).T, hidden_NH)


def _blocks(num_columns: int) -> list[slice]:
    return [slice(first, first + BLOCK) for first in range(0, num_columns, BLOCK)]
