"""Any other divergence: Σ_v h(log q(v), log p(v)) over the whole vocabulary, from its formula h.

In: both models' logits and the partition functions that the first sweep has combined. Out: one
number per token. It costs one more sweep, one more all-gather of [N, 2], and PyTorch's autograd of
h on a few rows at a time; a new divergence costs its formula and nothing else.
"""
# Shapes: N tokens, C of them in a chunk, V this rank's columns, R tensor-parallel ranks.

from collections.abc import Callable

import torch

from megatron_eopd.losses.kernels.eager import row_chunks
from megatron_eopd.losses.shards import LogPartition, Vocabulary, all_gather
from megatron_eopd.losses.vocab_parallel import TokenTerms

Integrand = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""h: (student's, teacher's log-probabilities [C, V]) → [C, V], pointwise, differentiable."""

LOWEST_LOGPROB = -1e4
"""exp of it is 0, and formulas that subtract log-probabilities stay finite."""


def sum_over_vocab(
    integrand: Integrand,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    terms: TokenTerms,
) -> torch.Tensor:
    """float32, shaped like the logits without their last dim; differentiable in student_logits."""
    flat = _VocabSum.apply(
        student_logits, teacher_logits.detach(), integrand, terms.vocabulary, terms.log_z
    )
    return flat.view(student_logits.shape[:-1])


class _VocabSum(torch.autograd.Function):
    """Forward: one all-gather. Backward: none.

    With h' = ∂h/∂ log q, and because log q(v) = s_v − log Σ exp(s), the gradient of Σ_v h with
    respect to s_j is h'_j − q_j · Σ_v h'_v. The forward exchanges Σ h and Σ h'.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, integrand, vocabulary, log_z):
        student_NV, teacher_NV = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
        sums_N2 = student_NV.new_empty((len(student_NV), 2), dtype=torch.float32)
        for rows in row_chunks(student_NV):
            value_CV, slope_CV, _ = _at_rows(
                rows, student_NV, teacher_NV, integrand, vocabulary, log_z
            )
            sums_N2[rows] = torch.stack([value_CV.sum(-1), slope_CV.sum(-1)], dim=-1)
        value_N, slope_N = all_gather(sums_N2, vocabulary.tp_group).sum(0).unbind(-1)
        ctx.save_for_backward(student_logits, teacher_logits, slope_N, *log_z)
        ctx.integrand, ctx.vocabulary = integrand, vocabulary
        return value_N

    @staticmethod
    def backward(ctx, g_N):
        student_logits, teacher_logits, slope_N, *log_z = ctx.saved_tensors
        student_NV, teacher_NV = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
        log_z, columns = LogPartition(*log_z), ctx.vocabulary.num_columns
        scale_N1 = (g_N / ctx.vocabulary.temperatures[0]).unsqueeze(-1)
        grad_NV = torch.zeros_like(student_NV)
        for rows in row_chunks(student_NV):
            _, slope_CV, log_q_CV = _at_rows(
                rows, student_NV, teacher_NV, ctx.integrand, ctx.vocabulary, log_z
            )
            total_C1 = slope_N[rows].unsqueeze(-1)
            grad = scale_N1[rows] * (slope_CV - log_q_CV.exp() * total_C1)
            grad_NV[rows, :columns] = grad.to(grad_NV.dtype)
        return grad_NV.view_as(student_logits), None, None, None, None


def _at_rows(
    rows: slice,
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    integrand: Integrand,
    vocabulary: Vocabulary,
    log_z: LogPartition,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, h' and log q of these rows, each [C, V] float32."""
    here = LogPartition(*(x[rows] for x in log_z))
    log_q, log_p = (
        here.logprobs(who, logits[rows, : vocabulary.num_columns], temperature).clamp_(
            min=LOWEST_LOGPROB
        )
        for who, (logits, temperature) in enumerate(
            zip((student_NV, teacher_NV), vocabulary.temperatures, strict=True)
        )
    )
    with torch.enable_grad():
        log_q.requires_grad_()
        value = integrand(log_q, log_p)
        (slope,) = torch.autograd.grad(value.sum(), log_q)
    return value.detach(), slope, log_q.detach()
