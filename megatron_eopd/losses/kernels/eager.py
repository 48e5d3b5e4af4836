"""Both sweeps in plain PyTorch, row chunk by row chunk. What they compute is said in __init__."""
# Shapes: N tokens, C of them in a chunk, V columns, K top-k.

from collections.abc import Iterator

import torch

from megatron_eopd.losses.kernels import LOWEST, ShardSums
from megatron_eopd.losses.top_k import top_k_of_rows

Temperatures = tuple[float, float]
"""The student's and the teacher's."""


def shard_sums(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    mask_N: torch.Tensor | None,
    num_columns: int,
    temperatures: Temperatures,
    top_k: int,
) -> ShardSums:
    num_tokens = len(student_NV)
    sums_N8 = student_NV.new_zeros((num_tokens, 8), dtype=torch.float32)
    values_NK = student_NV.new_full((num_tokens, top_k), LOWEST, dtype=torch.float32)
    columns_NK = student_NV.new_zeros((num_tokens, top_k), dtype=torch.int64)
    for rows in row_chunks(student_NV, mask_N):
        student, teacher = student_NV[rows, :num_columns], teacher_NV[rows, :num_columns]
        sums_N8[rows] = _sums(student, teacher, temperatures)
        if top_k:
            values_NK[rows], columns_NK[rows] = top_k_of_rows(teacher, top_k)
    return ShardSums(sums_N8, values_NK, columns_NK)


def _sums(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, temperatures: Temperatures
) -> torch.Tensor:
    maxima = [_maximum(student_CV), _maximum(teacher_CV)]
    s = _centred(student_CV, maxima[0], temperatures[0])
    t = _centred(teacher_CV, maxima[1], temperatures[1])
    e_s, e_t, d = s.exp(), t.exp(), s - t
    dot = torch.linalg.vecdot
    sums = [e_s.sum(-1), e_t.sum(-1), dot(e_s, d), dot(e_t, d), dot(e_t, t), dot(e_s, s)]
    return torch.stack([*(m.squeeze(-1) for m in maxima), *sums], dim=-1)


def shard_gradient(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    mask_N: torch.Tensor | None,
    num_columns: int,
    temperatures: Temperatures,
    weights_N7: torch.Tensor,
    inplace: bool,
) -> torch.Tensor:
    out_NV = student_NV if inplace else torch.empty_like(student_NV)
    out_NV[:, num_columns:] = 0
    if mask_N is not None:
        out_NV[~mask_N] = 0
    for rows in row_chunks(student_NV, mask_N):
        max_s, max_t, log_z_s, log_z_t, a, b, f = weights_N7[rows].unsqueeze(-1).unbind(1)
        s = _centred(student_NV[rows, :num_columns], max_s, temperatures[0])
        t = _centred(teacher_NV[rows, :num_columns], max_t, temperatures[1])
        grad = (s - t).mul_(a).add_(b).mul_(s.sub_(log_z_s).exp_())
        grad.sub_(t.sub_(log_z_t).exp_().mul_(f))
        # Rounded to the dtype of the logits here, once, after everything is multiplied.
        out_NV[rows, :num_columns] = grad.div_(temperatures[0]).to(out_NV.dtype)
    return out_NV


def _maximum(logits_CV: torch.Tensor) -> torch.Tensor:
    """[C, 1] float32; LOWEST of a shard without columns."""
    if not logits_CV.shape[-1]:
        return logits_CV.new_full((len(logits_CV), 1), LOWEST, dtype=torch.float32)
    return logits_CV.amax(-1, keepdim=True).float().clamp_(min=LOWEST)


def _centred(logits_CV: torch.Tensor, maximum: torch.Tensor, temperature: float) -> torch.Tensor:
    """[C, V] float32, a tensor of its own."""
    centred = (logits_CV.float() - maximum).clamp_(min=LOWEST)
    return centred if temperature == 1.0 else centred.div_(temperature)


def row_chunks(
    logits_NV: torch.Tensor, mask_N: torch.Tensor | None = None
) -> Iterator[slice | torch.Tensor]:
    """Rows that are worked on at once: on CPU, what the cache holds with all its temporaries."""
    elements = 1 << (18 if logits_NV.device.type == "cpu" else 27)
    step = max(1, elements // max(1, logits_NV.shape[1]))
    if mask_N is None:
        return (slice(first, first + step) for first in range(0, len(logits_NV), step))
    return iter(mask_N.nonzero().squeeze(-1).split(step)) if mask_N.any() else iter(())
