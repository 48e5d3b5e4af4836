"""KL terms of vocab-parallel logits. In: this rank's columns of both. Out: KLTerms, on every rank.

Each rank reduces its own columns to eight numbers per token (see kernels/), one all-gather
exchanges them, and every rank combines them. The gradient needs only what the forward has
combined, so the backward pass has no collective. Logits of single tokens, the sampled one and the
top k, ride along in the same all-gather.
"""
# Shapes: N tokens, V this rank's columns, R tensor-parallel ranks, K picked tokens.
# s, t: student and teacher; m: maximum; z: partition function.

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_eopd.losses.divergences import KLTerms
from megatron_eopd.losses.kernels import LOWEST
from megatron_eopd.losses.kernels.operators import shard_gradient, shard_sums
from megatron_eopd.losses.picked_tokens import (
    TEACHER,
    Pick,
    PickedTokens,
    Support,
    choose_tokens,
    pack_candidates,
)
from megatron_eopd.losses.shards import LogPartition, Vocabulary, all_gather, merge_shards

IMPOSSIBLE_KL = 1e9
"""In nats. A divergence beyond it comes from a logit of −inf that only one model has."""


class NonFiniteLogitsError(ValueError):
    """NaN, +inf, or nothing but −inf. The message says how many tokens, of whom, on which rank."""


class TokenTerms(NamedTuple):
    """What one sweep over both models' logits says about each token, on every rank alike."""

    kl: KLTerms
    picked: PickedTokens
    vocabulary: Vocabulary
    log_z: LogPartition
    non_finite_R2: torch.Tensor
    """int64: on each tensor-parallel rank, tokens whose student (0) or teacher (1) logits are not
    finite. Their terms are NaN."""


def vocab_parallel_kl_terms(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    inplace_backward: bool = False,
) -> KLTerms:
    """Reverse KL, forward KL and both entropies over the vocabulary of all ranks of `tp_group`.

    Forward: one all-gather. Backward: no collective. Accumulates in float32; keeps a handful of
    floats per token beside the logits themselves, and rounds the gradient once.

    Args:
        student_logits: [..., V_student], any float dtype; rank r of the group holds columns
            r·V_student to (r+1)·V_student of the padded vocabulary.
        teacher_logits: [..., V_teacher], cut the same way. Another padding than the student's is
            fine as long as this rank's real columns are the same tokens.
        tp_group: None means that the vocabulary is whole.
        vocab_size: true size; columns at or past it are padding and enter nothing.
        mask: bool [...]; where it is False the terms and the gradient are 0 and the logits are not
            read.
        inplace_backward: write the gradient over `student_logits` in the backward pass, which
            saves a tensor of their size. Nobody may read those logits afterwards.

    Returns:
        KLTerms, each float32 [...]; differentiable in student_logits through reverse_kl and
        forward_kl. The teacher gets no gradient. A token that one model can write and the other
        cannot (a logit of −inf) makes the divergence infinite.

    Raises:
        ValueError: shapes differ, or the real columns of the two are not the same tokens.
        NonFiniteLogitsError: on every rank of the group.
    """
    terms = vocab_parallel_terms(
        student_logits,
        teacher_logits,
        tp_group=tp_group,
        vocab_size=vocab_size,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
        inplace_backward=inplace_backward,
    )
    refuse_non_finite_logits(terms.non_finite_R2)
    return terms.kl


def vocab_parallel_terms(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    inplace_backward: bool = False,
    sampled_ids: torch.Tensor | None = None,
    top_k: int = 0,
    top_k_of: Support = "teacher",
) -> TokenTerms:
    """As vocab_parallel_kl_terms, with the log-probabilities of single tokens from the same sweep.

    Does not raise on non-finite logits but counts them, so that nothing waits for the device here:
    give `non_finite_R2` to `refuse_non_finite_logits` where there is time.

    Args:
        sampled_ids: int64 [...], token ids of the whole vocabulary.
        top_k: how many tokens of the largest probability ride along, and `top_k_of` whose. The
            teacher's come out of the sweep; the student's cost one more pass over its logits.
    """
    vocabulary = vocabulary_of(
        student_logits,
        teacher_logits,
        tp_group,
        vocab_size,
        (student_temperature, teacher_temperature),
    )
    shape = student_logits.shape[:-1]
    for name, given in (("mask", mask), ("sampled_ids", sampled_ids)):
        if given is not None and given.shape != shape:
            raise ValueError(
                f"{name} {tuple(given.shape)} must have one entry per token {(*shape,)}"
            )
    num_tokens = vocab_size or student_logits.shape[-1] * (
        dist.get_world_size(tp_group) if tp_group is not None else 1
    )
    pick = Pick(
        None if sampled_ids is None else sampled_ids.flatten(), min(top_k, num_tokens), top_k_of
    )
    outputs = _Sweep.apply(
        student_logits,
        teacher_logits.detach(),
        vocabulary,
        None if mask is None else mask.flatten(),
        inplace_backward,
        pick,
    )
    return TokenTerms(
        KLTerms(*(term.view(shape) for term in outputs[:4])),
        PickedTokens.from_columns(outputs[4:8], sampled_ids is not None, shape),
        vocabulary,
        LogPartition(*outputs[8:12]),
        outputs[12],
    )


def refuse_non_finite_logits(non_finite_R2: torch.Tensor) -> None:
    """
    Raises:
        NonFiniteLogitsError: when any token was counted.
    """
    message = describe_non_finite(non_finite_R2)
    if message:
        raise NonFiniteLogitsError(message)


def describe_non_finite(non_finite_R2: torch.Tensor) -> str:
    """Who has non-finite logits, at how many tokens, on which ranks; empty when nobody has."""
    found = [
        f"{who} logits of {count} token(s) on tensor-parallel rank {rank}"
        for rank, counts in enumerate(non_finite_R2.tolist())
        for who, count in zip(("student", "teacher"), counts, strict=True)
        if count
    ]
    if not found:
        return ""
    return f"not finite (NaN, +inf, or −inf for every token): {'; '.join(found)}."


def vocabulary_of(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int | None,
    temperatures: tuple[float, float],
) -> Vocabulary:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} "
            f"speak of different tokens: their leading dims must be equal."
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"logits must be floats, not {student.dtype} and {teacher.dtype}.")
    if min(temperatures) <= 0:
        raise ValueError(f"temperatures must be > 0, not {temperatures}.")
    tp_rank = dist.get_rank(tp_group) if tp_group is not None else 0

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
    return Vocabulary(start, count, tp_group, temperatures)


class _Sweep(torch.autograd.Function):
    """Forward: one all-gather of [N, 8 + what rides along] float32. Backward: no collective.

    Right because every rank of the group computes the same loss from the same terms: the upstream
    gradient is the same on all ranks, and each rank owns the gradient of its own columns.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, vocabulary, mask_N, inplace, pick):
        student_NV, teacher_NV = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
        temperatures = vocabulary.temperatures
        top_k_in_sweep = pick.top_k if TEACHER in pick.rankings else 0
        shard = shard_sums(
            student_NV, teacher_NV, mask_N, vocabulary.num_columns, temperatures, top_k_in_sweep
        )
        candidates_NW = pack_candidates(
            student_NV,
            teacher_NV,
            vocabulary,
            (shard.top_values_NK, shard.top_columns_NK),
            pick,
        )
        gathered_RNW = all_gather(
            torch.cat([shard.sums_N8, candidates_NW], dim=-1), vocabulary.tp_group
        )
        sums_RN8, gathered_RNW = gathered_RNW[..., :8], gathered_RNW[..., 8:]
        sums_N8 = merge_shards(sums_RN8, temperatures)
        log_ratio_N, log_z, terms = finish_sums(sums_N8)
        ids_NK, *picked = choose_tokens(gathered_RNW, pick, log_z, temperatures)
        if mask_N is not None:
            terms = [term.where(mask_N, 0.0) for term in terms]
            picked = [x.where(mask_N.unsqueeze(-1), torch.zeros_like(x)) for x in picked]
        ctx.save_for_backward(student_logits, teacher_logits, mask_N, ids_NK, log_ratio_N, *log_z)
        ctx.vocabulary, ctx.inplace = vocabulary, inplace
        ctx.mark_non_differentiable(*terms[2:], ids_NK, *picked[1:], *log_z)
        return (*terms, ids_NK, *picked, *log_z, count_non_finite(sums_RN8, sums_N8, mask_N))

    @staticmethod
    def backward(ctx, g_reverse, g_forward, _, __, ___, g_picked_NK, *____):
        student_logits, teacher_logits, mask_N, ids_NK, log_ratio_N, *log_z = ctx.saved_tensors
        student_NV, teacher_NV = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
        g_reverse, g_forward = g_reverse.flatten(), g_forward.flatten()
        # d log q(id) / ds_j = [j = id] − q_j; the first part is written token by token below.
        b_N = g_forward - g_reverse * log_ratio_N - g_picked_NK.sum(-1)
        weights_N7 = torch.stack([*log_z, g_reverse, b_N, g_forward], dim=-1)
        # Before the sweep, which may overwrite the student's logits.
        columns_NK, values_NK = picked_gradient(
            student_NV, teacher_NV, ctx.vocabulary, weights_N7, ids_NK, g_picked_NK
        )
        grad_NV = shard_gradient(
            student_NV,
            teacher_NV,
            mask_N,
            ctx.vocabulary.num_columns,
            ctx.vocabulary.temperatures,
            weights_N7,
            ctx.inplace,
        )
        if mask_N is not None:
            values_NK = values_NK.where(mask_N.unsqueeze(-1), 0.0)
        grad_NV.scatter_(-1, columns_NK, values_NK.to(grad_NV.dtype))
        return grad_NV.view_as(student_logits), None, None, None, None, None


def finish_sums(sums_N8: torch.Tensor) -> tuple[torch.Tensor, LogPartition, list[torch.Tensor]]:
    """E_q[s − t], the partition functions and the four terms, each [N]."""
    max_s, max_t, z_s, z_t, d_s, d_t, a_t, a_s = sums_N8.unbind(-1)
    log_z_s, log_z_t = z_s.log(), z_t.log()
    log_ratio = d_s / z_s
    reverse_kl = log_ratio - log_z_s + log_z_t
    forward_kl = log_z_s - log_z_t - d_t / z_t
    terms = [x.where(~(x > IMPOSSIBLE_KL), torch.inf) for x in (reverse_kl, forward_kl)]
    terms += [log_z_t - a_t / z_t, log_z_s - a_s / z_s]
    return log_ratio, LogPartition(max_s, max_t, log_z_s, log_z_t), terms


def count_non_finite(
    sums_RN8: torch.Tensor, sums_N8: torch.Tensor, mask_N: torch.Tensor | None
) -> torch.Tensor:
    """int64 [R, 2]; a token without any finite logit is counted on rank 0."""
    counts = []
    for own in ([0, 2, 7], [1, 3, 6]):  # maximum, Σe, Σe·x: of the student, of the teacher
        bad_RN = ~sums_RN8[..., own].isfinite().all(-1)
        bad_RN[0] |= sums_N8[:, own[0]] <= LOWEST
        if mask_N is not None:
            bad_RN &= mask_N
        counts.append(bad_RN.sum(-1))
    return torch.stack(counts, dim=-1)


def picked_gradient(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    vocabulary: Vocabulary,
    weights_N7: torch.Tensor,
    ids_NK: torch.Tensor,
    g_picked_NK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns, values), both [N, K]: the whole gradient at the picked tokens, in float32.

    A token that another rank owns stands for column 0 and gets what column 0 has to get anyway, so
    writing it loses nothing; tokens picked twice share the sum.
    """
    max_s, max_t, log_z_s, log_z_t, a, b, f = weights_N7.unsqueeze(-1).unbind(1)
    if not vocabulary.num_columns:
        ids_NK, g_picked_NK = ids_NK[:, :0], g_picked_NK[:, :0]
    columns_NK, owned_NK = vocabulary.columns_of(ids_NK)
    s, t = (
        (x.gather(-1, columns_NK).float().clamp(min=LOWEST) - maximum) / temperature
        for x, maximum, temperature in zip(
            (student_NV, teacher_NV), (max_s, max_t), vocabulary.temperatures, strict=True
        )
    )
    same_NKK = (columns_NK.unsqueeze(-1) == columns_NK.unsqueeze(-2)) & owned_NK.unsqueeze(-2)
    at_token_NK = (same_NKK * g_picked_NK.unsqueeze(-2)).sum(-1)
    dense_NK = (s - log_z_s).exp() * (a * (s - t) + b) - f * (t - log_z_t).exp()
    return columns_NK, (dense_NK + at_token_NK) / vocabulary.temperatures[0]
