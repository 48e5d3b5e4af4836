"""KL terms of vocab-parallel logits. In: this rank's columns of both. Out: KLTerms, on every rank.

Each rank reduces its own columns to eight numbers per token, one all-gather exchanges them, and
every rank combines them. The gradient needs only the log-partition functions and the mean
log-ratio, which the forward has, so the backward pass has no collective.
"""
# Shapes: N tokens, V this rank's columns, R tensor-parallel ranks.
# s, t: student and teacher logits divided by their temperatures. m: maximum. p: probability.

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_eopd.losses.divergences import KLTerms


def vocab_parallel_kl_terms(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> KLTerms:
    """Reverse KL, forward KL and both entropies over the vocabulary of all ranks of `tp_group`.

    Args:
        student_logits: [..., V_student], any float dtype; rank r of the group holds columns
            r·V_student to (r+1)·V_student of the padded vocabulary.
        teacher_logits: [..., V_teacher], cut the same way. Another padding than the student's is
            fine as long as this rank's real columns are the same tokens.
        tp_group: None means that the vocabulary is whole.
        vocab_size: true size; columns at or past it are padding and enter nothing.

    Returns:
        KLTerms, each float32 [...]; differentiable in student_logits through reverse_kl and
        forward_kl. The teacher gets no gradient.

    Raises:
        ValueError: the leading dims differ, or the real columns of the two are not the same tokens.
    """
    tp_rank = dist.get_rank(tp_group) if tp_group is not None else 0
    num_columns = _num_real_columns(student_logits, teacher_logits, tp_rank, vocab_size)
    terms = _KLTerms.apply(
        student_logits,
        teacher_logits.detach(),
        num_columns,
        tp_group,
        student_temperature,
        teacher_temperature,
    )
    return KLTerms(*terms)


def _num_real_columns(
    student: torch.Tensor, teacher: torch.Tensor, tp_rank: int, vocab_size: int | None
) -> int:
    """Columns of this rank that are real tokens; they come first."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} "
            f"speak of different tokens: their leading dims must be equal."
        )

    def real(width: int) -> tuple[int, int]:
        start = tp_rank * width
        size = vocab_size if vocab_size is not None else start + width
        return start, min(max(size - start, 0), width)

    (start, count), teacher_real = real(student.shape[-1]), real(teacher.shape[-1])
    if (start, count) != teacher_real and (count or teacher_real[1]):
        raise ValueError(
            f"tensor-parallel rank {tp_rank} holds student columns from {start}, {count} real, but "
            f"teacher columns from {teacher_real[0]}, {teacher_real[1]} real (vocab_size="
            f"{vocab_size}). Pad both vocabularies to the same size."
        )
    return count


class _KLTerms(torch.autograd.Function):
    """Forward: one all-gather of [N, 8] float32. Backward: no collective.

    Right because every rank of the group computes the same loss from the same terms: the upstream
    gradient is the same on all ranks, and each rank owns the gradient of its own columns.
    """

    @staticmethod
    def forward(
        ctx, student_logits, teacher_logits, num_columns, tp_group, student_temp, teacher_temp
    ):
        student_NV, teacher_NV = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
        sums_N8 = student_NV.new_empty((len(student_NV), 8), dtype=torch.float32)
        for rows in _row_chunks(student_NV):
            s = _real_columns(student_NV[rows], num_columns, student_temp)
            t = _real_columns(teacher_NV[rows], num_columns, teacher_temp)
            sums_N8[rows] = _shard_sums(s, t)
        log_ratio, log_z_s, log_z_t, terms = _combine(_gather_sums(sums_N8, tp_group))
        ctx.save_for_backward(student_logits, teacher_logits, log_ratio, log_z_s, log_z_t)
        ctx.num_columns, ctx.temperatures = num_columns, (student_temp, teacher_temp)
        terms = tuple(term.view(student_logits.shape[:-1]) for term in terms)
        ctx.mark_non_differentiable(*terms[2:])
        return terms

    @staticmethod
    def backward(ctx, grad_reverse, grad_forward, *_):
        student_logits, teacher_logits, *saved = ctx.saved_tensors
        student_NV, teacher_NV = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
        per_token = [*saved, grad_reverse.reshape(-1, 1), grad_forward.reshape(-1, 1)]
        grad_NV = torch.zeros_like(student_NV)
        for rows in _row_chunks(student_NV):
            s = _real_columns(student_NV[rows], ctx.num_columns, ctx.temperatures[0])
            t = _real_columns(teacher_NV[rows], ctx.num_columns, ctx.temperatures[1])
            grad = _grad_of_scaled(s, t, *(x[rows] for x in per_token))
            # Rounded to the logits' dtype once, here, after everything is multiplied.
            grad_NV[rows, : ctx.num_columns] = grad / ctx.temperatures[0]
        return grad_NV.view_as(student_logits), None, None, None, None, None


def _row_chunks(logits_NV: torch.Tensor) -> Iterator[slice]:
    """Rows that are worked on at once: on CPU, what the cache holds with all its temporaries."""
    elements = 1 << (18 if logits_NV.device.type == "cpu" else 27)
    step = max(1, elements // max(1, logits_NV.shape[1]))
    return (slice(first, first + step) for first in range(0, len(logits_NV), step))


def _real_columns(logits_NV: torch.Tensor, num_columns: int, temperature: float) -> torch.Tensor:
    """[N, V] float32 without padding, divided by the temperature."""
    real = logits_NV[:, :num_columns].float()
    return real if temperature == 1.0 else real / temperature


def _grad_of_scaled(
    s: torch.Tensor,
    t: torch.Tensor,
    log_ratio: torch.Tensor,
    log_z_s: torch.Tensor,
    log_z_t: torch.Tensor,
    weight_r: torch.Tensor,
    weight_f: torch.Tensor,
) -> torch.Tensor:
    """d(weight_r · reverse_kl + weight_f · forward_kl) / ds."""
    p_s, p_t = (s - log_z_s).exp(), (t - log_z_t).exp()
    # A column that neither distribution can reach (−inf on both sides) has no log-ratio.
    difference = torch.where(p_s > 0, s - t, 0.0)
    return p_s * (weight_r * (difference - log_ratio) + weight_f) - weight_f * p_t


# float32 exp() of this difference is 0; −inf would make −inf − (−inf) of an empty shard.
_LOWEST = -1e30


def _shard_sums(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """[N, 8]: m_s, m_t, Σe_s, Σe_t, Σe_s(s−t), Σe_t(t−s), Σe_t·t, Σe_s·s with e = exp(· − m)."""
    m_s, m_t = (
        x.amax(-1, keepdim=True).clamp(min=_LOWEST)
        if x.shape[-1]
        else x.new_full((len(x), 1), _LOWEST)
        for x in (s, t)
    )
    e_s, e_t = (s - m_s).exp(), (t - m_t).exp()

    def total(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        # 0 · (±inf) is a token that cannot happen: it adds nothing.
        return torch.where(weights > 0, weights * values, 0.0).sum(-1, keepdim=True)

    return torch.cat(
        [
            m_s,
            m_t,
            e_s.sum(-1, keepdim=True),
            e_t.sum(-1, keepdim=True),
            total(e_s, s - t),
            total(e_t, t - s),
            total(e_t, t),
            total(e_s, s),
        ],
        dim=-1,
    )


def _gather_sums(sums_N8: torch.Tensor, tp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """[R, N, 8]: every rank's sums, on every rank."""
    if tp_group is None:
        return sums_N8.unsqueeze(0)
    gathered = [torch.empty_like(sums_N8) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(gathered, sums_N8, group=tp_group)
    return torch.stack(gathered)


def _combine(sums_RN8: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple]:
    """E_s[s−t], log Z_s, log Z_t (each [N, 1]) and the four terms ([N]), from all shards' sums."""
    m_s, m_t, z_s, z_t, d_s, d_t, a_t, a_s = sums_RN8.unsqueeze(-2).unbind(-1)  # each [R, N, 1]
    max_s, max_t = m_s.amax(0), m_t.amax(0)
    scale_s, scale_t = (m_s - max_s).exp(), (m_t - max_t).exp()
    z_s, d_s, a_s = ((scale_s * x).sum(0) for x in (z_s, d_s, a_s))
    z_t, d_t, a_t = ((scale_t * x).sum(0) for x in (z_t, d_t, a_t))
    log_z_s, log_z_t = max_s + z_s.log(), max_t + z_t.log()
    log_ratio = d_s / z_s
    terms = (
        log_ratio - log_z_s + log_z_t,
        d_t / z_t - log_z_t + log_z_s,
        log_z_t - a_t / z_t,
        log_z_s - a_s / z_s,
    )
    return log_ratio, log_z_s, log_z_t, tuple(term.squeeze(-1) for term in terms)
