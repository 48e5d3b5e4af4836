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
    scratch = _scratch(student_NV, num_columns, count=6)
    for rows in row_chunks(student_NV, mask_N):
        student, teacher = student_NV[rows, :num_columns], teacher_NV[rows, :num_columns]
        sums_N8[rows] = _sums(student, teacher, temperatures, scratch[:, : len(student)])
        if top_k:
            values_NK[rows], columns_NK[rows] = top_k_of_rows(teacher, top_k)
    return ShardSums(sums_N8, values_NK, columns_NK)


def _sums(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    temperatures: Temperatures,
    scratch: torch.Tensor,
) -> torch.Tensor:
    maxima = [_maximum(student_CV), _maximum(teacher_CV)]
    s = _centred(student_CV, maxima[0], temperatures[0], out=scratch[0])
    t = _centred(teacher_CV, maxima[1], temperatures[1], out=scratch[1])
    e_s, e_t = torch.exp(s, out=scratch[2]), torch.exp(t, out=scratch[3])
    d = torch.sub(s, t, out=scratch[4])

    def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.mul(a, b, out=scratch[5]).sum(-1)

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
    scratch = _scratch(student_NV, num_columns, count=3)
    for rows in row_chunks(student_NV, mask_N):
        student, teacher = student_NV[rows, :num_columns], teacher_NV[rows, :num_columns]
        max_s, max_t, log_z_s, log_z_t, a, b, f = weights_N7[rows].unsqueeze(-1).unbind(1)
        s, t, grad = scratch[:, : len(student)]
        _centred(student, max_s, temperatures[0], out=s)
        _centred(teacher, max_t, temperatures[1], out=t)
        # Every factor that a token's columns share goes into a, b and f: fewer passes.
        share_s, share_t = (-log_z_s).exp() / temperatures[0], (-log_z_t).exp() / temperatures[0]
        torch.sub(s, t, out=grad)
        torch.addcmul(b * share_s, grad, a * share_s, out=grad).mul_(s.exp_())
        grad.addcmul_(t.exp_(), f * share_t, value=-1)
        # Rounded to the dtype of the logits here, once, after everything is multiplied.
        out_NV[rows, :num_columns] = grad.to(out_NV.dtype)
    return out_NV


def _scratch(logits_NV: torch.Tensor, num_columns: int, count: int) -> torch.Tensor:
    """Room for `count` temporaries of a chunk: given back and asked for again at every chunk, it
    would come as untouched pages each time, at twice the cost of the arithmetic."""
    shape = (count, min(_rows_at_once(logits_NV), len(logits_NV)), num_columns)
    return logits_NV.new_empty(shape, dtype=torch.float32)


def _maximum(logits_CV: torch.Tensor) -> torch.Tensor:
    """[C, 1] float32; LOWEST of a shard without columns."""
    if not logits_CV.shape[-1]:
        return logits_CV.new_full((len(logits_CV), 1), LOWEST, dtype=torch.float32)
    return logits_CV.amax(-1, keepdim=True).float().clamp_(min=LOWEST)


def _centred(
    logits_CV: torch.Tensor, maximum: torch.Tensor, temperature: float, *, out: torch.Tensor
) -> torch.Tensor:
    """[C, V] float32."""
    torch.sub(logits_CV, maximum, out=out).clamp_(min=LOWEST)
    return out if temperature == 1.0 else out.div_(temperature)


def row_chunks(
    logits_NV: torch.Tensor, mask_N: torch.Tensor | None = None
) -> Iterator[slice | torch.Tensor]:
    """Rows that are worked on at once: on CPU, what the cache can hold."""
    step = _rows_at_once(logits_NV)
    if mask_N is None:
        return (slice(first, first + step) for first in range(0, len(logits_NV), step))
    return iter(mask_N.nonzero().squeeze(-1).split(step)) if mask_N.any() else iter(())


def _rows_at_once(logits_NV: torch.Tensor) -> int:
    elements = 1 << (20 if logits_NV.device.type == "cpu" else 27)
    return max(1, elements // max(1, logits_NV.shape[1]))
