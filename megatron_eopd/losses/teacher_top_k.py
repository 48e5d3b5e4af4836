"""A teacher that hands over its k most probable tokens, not logits, and the loss side of that.

`top_k_of_teacher` runs where the teacher's logits are: out come k tokens per position and three
exact numbers about the whole distribution. `top_k_terms` runs where the student's logits are and
makes of both what estimators and metrics read. Log-probabilities and both entropies, hence the
gate, are exact. Divergences are not: how the teacher's mass outside its top k is spread stays with
the teacher.
"""
# Shapes: N tokens, V this rank's columns, C rows worked on at once, K the teacher's top k,
# P = 1 + K picked tokens (the sampled one first), R tensor-parallel ranks, W floats that travel.

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_eopd.losses.divergences import KLTerms
from megatron_eopd.losses.estimators import SMALLEST_TAIL
from megatron_eopd.losses.kernels import LOWEST
from megatron_eopd.losses.kernels.eager import row_chunks
from megatron_eopd.losses.kernels.operators import shard_gradient, shard_sums
from megatron_eopd.losses.picked_tokens import STUDENT, TEACHER, PickedTokens, logits_at
from megatron_eopd.losses.shards import LogPartition, Vocabulary, all_gather, merge_shards
from megatron_eopd.losses.vocab_parallel import (
    TokenTerms,
    count_non_finite,
    finish_sums,
    picked_gradient,
    vocab_parallel_terms,
    vocabulary_of,
)
from megatron_eopd.records import TeacherTopK


class TopKTerms(NamedTuple):
    """As TokenTerms, without what another sweep over both models' logits would need."""

    kl: KLTerms
    """Without gradient. The entropies are exact. The divergences are those of K + 1 parts, the k
    tokens and the rest, and never larger than the exact ones: for metrics only."""
    picked: PickedTokens
    non_finite_R2: torch.Tensor
    """int64, as in TokenTerms. Which of its ranks had the bad logits the teacher does not say:
    all are counted on rank 0."""
    vocabulary: Vocabulary
    log_z: LogPartition
    """The student's; in the teacher's place, too."""


@torch.no_grad()
def top_k_of_teacher(
    teacher_logits_NV: torch.Tensor,
    sampled_ids_N: torch.Tensor,
    *,
    top_k: int,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float,
) -> TeacherTopK:
    """The same on every rank of `tp_group`; K is top_k, or vocab_size where that is smaller.

    Two sweeps over this rank's columns, two all-gathers of a few floats per token and rank.
    Non-finite logits do not raise here but travel as NaN, to be counted by `top_k_terms`.
    """
    if top_k < 1:
        raise ValueError(f"a teacher that hands over its top k needs k > 0, not top_k={top_k}.")
    terms = vocab_parallel_terms(
        teacher_logits_NV,
        teacher_logits_NV,
        tp_group=tp_group,
        vocab_size=vocab_size,
        student_temperature=temperature,
        teacher_temperature=temperature,
        sampled_ids=sampled_ids_N,
        top_k=top_k,
    )
    valid_NK = terms.picked.top_valid
    ids_NK = terms.picked.top_ids.where(valid_NK, 0)
    return TeacherTopK(
        ids_NK,
        terms.picked.top_teacher_logprobs.where(valid_NK, LOWEST),
        # Logits of nothing but −inf have finite sums: those of a uniform distribution.
        terms.kl.teacher_entropy.where(valid_NK[:, 0], torch.nan),
        _log_mass_outside(teacher_logits_NV, ids_NK, valid_NK, terms),
        terms.picked.sampled_teacher_logprobs,
    )


def _log_mass_outside(
    logits_NV: torch.Tensor, ids_NK: torch.Tensor, valid_NK: torch.Tensor, terms: TokenTerms
) -> torch.Tensor:
    """float32 [N], summed over the other tokens, relative to the largest of them.

    1 − Σ over the top k would be nothing but rounding below a mass of about 1e-6.
    """
    vocabulary, temperatures = terms.vocabulary, terms.vocabulary.temperatures
    columns_NK, owned_NK = vocabulary.columns_of(ids_NK)
    # A column behind the real ones takes what this rank does not own.
    columns_NK = columns_NK.where(owned_NK & valid_NK, vocabulary.num_columns)
    sums_N8 = logits_NV.new_empty((len(logits_NV), 8), dtype=torch.float32)
    for rows in row_chunks(logits_NV):
        others_CV = torch.nn.functional.pad(logits_NV[rows, : vocabulary.num_columns], (0, 1))
        others_CV.scatter_(-1, columns_NK[rows], -torch.inf)
        sums_N8[rows] = shard_sums(
            others_CV, others_CV, None, vocabulary.num_columns, temperatures, 0
        ).sums_N8
    sums_N8 = merge_shards(all_gather(sums_N8, vocabulary.tp_group), temperatures)
    largest_N1, sum_N = sums_N8[:, TEACHER, None], sums_N8[:, 2 + TEACHER]
    largest_logprob_N1 = terms.log_z.logprobs(TEACHER, largest_N1, temperatures[TEACHER])
    logmass_N = largest_logprob_N1.squeeze(-1) + sum_N.log()
    return logmass_N.where(~(largest_N1.squeeze(-1) <= LOWEST), LOWEST)


def top_k_terms(
    student_logits_NV: torch.Tensor,
    teacher: TeacherTopK,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int,
    student_temperature: float,
    sampled_ids: torch.Tensor,
    inplace_backward: bool = False,
) -> TopKTerms:
    """What estimators read of each token, on every rank of `tp_group` alike.

    Forward: one all-gather. Backward: no collective. Differentiable in student_logits_NV through
    picked.sampled_student_logprobs and picked.top_student_logprobs. Estimators that need the
    teacher's whole distribution (full, skewed, jsd) cannot be built on this.

    Args:
        student_logits_NV: rank r of the group holds columns r·V to (r+1)·V of the padded
            vocabulary; columns at or past `vocab_size` enter nothing.
        teacher: of the same tokens, the same on all ranks of the group.
        sampled_ids: int64 [N], the ids whose log-probabilities the teacher was asked for.
        inplace_backward: write the gradient over the logits. Nobody may read them afterwards.
    """
    num_tokens = len(student_logits_NV)
    if not num_tokens == len(teacher.ids_NK) == len(sampled_ids):
        raise ValueError(
            f"student logits of {num_tokens} tokens, a teacher's top k of {len(teacher.ids_NK)} "
            f"and {len(sampled_ids)} sampled ids speak of different tokens: hand over equal rows."
        )
    temperatures = (student_temperature, student_temperature)
    vocabulary = vocabulary_of(
        student_logits_NV, student_logits_NV, tp_group, vocab_size, temperatures
    )
    ids_NP = torch.cat([sampled_ids.unsqueeze(-1), teacher.ids_NK], dim=-1)
    logprobs_NP, entropy_N, non_finite_R, *log_z = _StudentSweep.apply(
        student_logits_NV, ids_NP, vocabulary, inplace_backward
    )
    picked = PickedTokens(
        sampled_student_logprobs=logprobs_NP[:, 0],
        sampled_teacher_logprobs=teacher.sampled_logprobs_N,
        top_ids=teacher.ids_NK,
        top_student_logprobs=logprobs_NP[:, 1:],
        top_teacher_logprobs=teacher.logprobs_NK,
        top_valid=teacher.valid_NK,
    )
    teachers_R = torch.zeros_like(non_finite_R)
    teachers_R[0] = _count_non_finite_rows(teacher)
    return TopKTerms(
        _kl_of_parts(logprobs_NP[:, 1:].detach(), entropy_N, teacher),
        picked,
        torch.stack([non_finite_R, teachers_R], dim=-1),
        vocabulary,
        LogPartition(*log_z),
    )


def _count_non_finite_rows(teacher: TeacherTopK) -> torch.Tensor:
    numbers = torch.stack([teacher.entropy_N, teacher.tail_logmass_N, teacher.sampled_logprobs_N])
    finite_N = numbers.isfinite().all(0) & teacher.logprobs_NK.isfinite().all(-1)
    return (~finite_N).sum()


def _kl_of_parts(
    student_NK: torch.Tensor, student_entropy_N: torch.Tensor, teacher: TeacherTopK
) -> KLTerms:
    """Between the distributions over the k tokens and one part of all others.

    Merging tokens into one part can only lower a divergence. So can counting a tail of less than
    SMALLEST_TAIL as that much, to within SMALLEST_TAIL times a few nats; where both tails are so
    small, as with k = V, they cancel.
    """
    student_NK = student_NK.where(teacher.valid_NK, LOWEST)
    student_tail_N = (1 - student_NK.exp().sum(-1)).clamp(min=SMALLEST_TAIL).log()
    teacher_tail_N = teacher.tail_logmass_N.clamp(min=math.log(SMALLEST_TAIL))
    log_q = torch.cat([student_NK, student_tail_N.unsqueeze(-1)], dim=-1)
    log_p = torch.cat([teacher.logprobs_NK, teacher_tail_N.unsqueeze(-1)], dim=-1)
    return KLTerms(
        reverse_kl=(log_q.exp() * (log_q - log_p)).sum(-1),
        forward_kl=(log_p.exp() * (log_p - log_q)).sum(-1),
        teacher_entropy=teacher.entropy_N,
        student_entropy=student_entropy_N,
    )


class _StudentSweep(torch.autograd.Function):
    """log q of the picked tokens [N, P], the student's entropy [N], its non-finite tokens [R], and
    its LogPartition.

    Forward: one all-gather of [N, 8 + P] float32. Backward: no collective. Right because every
    rank of the group computes the same loss from the same log-probabilities: the upstream gradient
    is the same on all ranks, and each rank owns the gradient of its own columns.

    The sweeps are those of two models (see kernels/), with the student as both: s = t.
    """

    @staticmethod
    def forward(ctx, student_NV, ids_NP, vocabulary, inplace):
        temperatures = vocabulary.temperatures
        shard = shard_sums(student_NV, student_NV, None, vocabulary.num_columns, temperatures, 0)
        columns_NP, owned_NP = vocabulary.columns_of(ids_NP)
        logits_NP = logits_at(student_NV, columns_NP).where(owned_NP, LOWEST)
        gathered_RNW = all_gather(
            torch.cat([shard.sums_N8, logits_NP], dim=-1), vocabulary.tp_group
        )
        sums_RN8, logits_RNP = gathered_RNW[..., :8], gathered_RNW[..., 8:]
        sums_N8 = merge_shards(sums_RN8, temperatures)
        _, log_z, terms = finish_sums(sums_N8)
        # One rank owns a token, and LOWEST is what the others say.
        logprobs_NP = log_z.logprobs(STUDENT, logits_RNP.amax(0), temperatures[STUDENT])
        ctx.save_for_backward(student_NV, ids_NP, *log_z)
        ctx.vocabulary, ctx.inplace = vocabulary, inplace
        entropy_N = KLTerms(*terms).student_entropy
        ctx.mark_non_differentiable(entropy_N, *log_z)
        non_finite_R = count_non_finite(sums_RN8, sums_N8, None)[:, STUDENT]
        return logprobs_NP, entropy_N, non_finite_R, *log_z

    @staticmethod
    def backward(ctx, g_NP, *_):
        student_NV, ids_NP, *log_z = ctx.saved_tensors
        # d log q(id) / ds_j = [j = id] − q_j; the first part is written token by token below.
        b_N = -g_NP.sum(-1)
        none_N = torch.zeros_like(b_N)
        weights_N7 = torch.stack([*log_z, none_N, b_N, none_N], dim=-1)
        # Before the sweep, which may overwrite the logits.
        columns_NP, values_NP = picked_gradient(
            student_NV, student_NV, ctx.vocabulary, weights_N7, ids_NP, g_NP
        )
        grad_NV = shard_gradient(
            student_NV,
            student_NV,
            None,
            ctx.vocabulary.num_columns,
            ctx.vocabulary.temperatures,
            weights_N7,
            ctx.inplace,
        )
        grad_NV.scatter_(-1, columns_NP, values_NP.to(grad_NV.dtype))
        # A view, because autograd copies what is also saved before it becomes a leaf's .grad.
        return grad_NV.view_as(student_NV), None, None, None
