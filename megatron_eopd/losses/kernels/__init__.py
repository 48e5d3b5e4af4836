"""The two sweeps over a rank's columns of the vocabulary, in three forms with one signature.

    shard_sums(student_NV, teacher_NV, mask_N, num_columns, temperatures, top_k) -> ShardSums
    shard_gradient(student_NV, teacher_NV, mask_N, num_columns, temperatures, weights_N7, inplace)
        -> gradient of the student's logits, in their dtype; masked rows and padding columns are 0

`eager` is PyTorch on any device and the one to read first, `cpu` the same in C++ where a compiler
is found, `triton_gpu` the same on CUDA. None of them communicates.

With s = (x_s − m_s)/T_s and t = (x_t − m_t)/T_t, x the logits and m their maximum over the shard,
e_s = exp(s), e_t = exp(t) and d = s − t, a token's eight sums are

    m_s, m_t, Σe_s, Σe_t, Σe_s·d, Σe_t·d, Σe_t·t, Σe_s·s

and its gradient, with the maxima M and the partition functions Z of the whole vocabulary, is

    { exp(s − ln Z_s) · (a·d + b) − f · exp(t − ln Z_t) } / T_s,     s and t now relative to M

where weights_N7 holds M_s, M_t, ln Z_s, ln Z_t, a, b, f. Subtracting the maximum before dividing
keeps the precision of logits that are far from 0. A logit of −inf counts as LOWEST: it has no
probability, and its products stay finite.
"""
# Shapes: N tokens, V this rank's columns, of which the first num_columns are real tokens.

from types import ModuleType
from typing import NamedTuple

import torch

from megatron_eopd.records import LOWEST

__all__ = ["LOWEST", "ShardSums", "kernels_for", "with_unit_stride"]


class ShardSums(NamedTuple):
    """What one shard says about each token. Rows of masked tokens hold zeros."""

    sums_N8: torch.Tensor
    """float32, in the order above."""
    top_values_NK: torch.Tensor
    """float32 [N, top_k]: the teacher's largest logits of this shard, in descending order, equal
    ones by column; LOWEST where the shard has fewer."""
    top_columns_NK: torch.Tensor
    """int64 [N, top_k]: their columns; 0 where the shard has fewer."""


def kernels_for(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> ModuleType:
    """The fastest form that runs these tensors here."""
    from megatron_eopd.losses.kernels import cpu, eager

    if student_logits.is_cuda:
        from megatron_eopd.losses.kernels import triton_gpu

        return triton_gpu
    return cpu if cpu.handles(student_logits, teacher_logits) else eager


def with_unit_stride(logits_NV: torch.Tensor) -> torch.Tensor:
    """Compiled sweeps walk along rows, whose entries must lie next to each other."""
    return logits_NV if logits_NV.stride(-1) == 1 else logits_NV.contiguous()
