"""Likely alternatives of single tokens, and their ranks. In: both models' logits of some tokens,
and what the sweep said of them. Out: TokenDetails, without gradient.

Costs a pass over the student's logits for its top k, and one over each model's for the rank, so
only for the tokens that are looked at. The teacher's top k comes from the sweep, unless the loss
asked that for fewer tokens.
"""
# Shapes: N tokens, V this rank's columns of the vocabulary, K twice the top k, R tensor-parallel
# ranks, W floats that travel.

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from megatron_eopd.losses.kernels.eager import row_chunks
from megatron_eopd.losses.picked_tokens import (
    RANKED_BY,
    STUDENT,
    TEACHER,
    Pick,
    PickedTokens,
    choose_tokens,
    pack_candidates,
)
from megatron_eopd.losses.shards import LogPartition, all_gather
from megatron_eopd.losses.teacher_top_k import TopKTerms
from megatron_eopd.losses.top_k import top_k_of_rows
from megatron_eopd.losses.vocab_parallel import TokenTerms
from megatron_eopd.records import TeacherTopK


class TokenDetails(NamedTuple):
    """The same on every tensor-parallel rank."""

    student_rank_N: torch.Tensor
    """int32: 1 + how many tokens the student finds more likely than the sampled one."""
    teacher_rank_N: torch.Tensor
    """0 where unknown: of a teacher that hands over its top k, outside of them."""
    top_ids_NK: torch.Tensor
    """int64: the teacher's most probable first, then the student's; −1 where there is none, or
    where the teacher's list has it already."""
    top_student_logprobs_NK: torch.Tensor
    """float32, in nats, at the loss's temperatures."""
    top_teacher_logprobs_NK: torch.Tensor
    """NaN where unknown."""


@torch.no_grad()
def details_of_logits(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    terms: TokenTerms,
    sampled_ids_N: torch.Tensor,
    rows: slice,
    *,
    top_k: int,
    swept_top_k: int = 0,
) -> TokenDetails:
    """Of the tokens `rows`. One all-gather and one all-reduce over the tensor-parallel group.

    `swept_top_k`: how many of the teacher's most probable tokens are the first ones of
    `terms.picked`; where they are fewer than `top_k` they are looked for anew.
    """
    student_NV, teacher_NV, sampled_ids_N = student_NV[rows], teacher_NV[rows], sampled_ids_N[rows]
    has_swept = swept_top_k >= top_k
    rankings = (STUDENT,) if has_swept else (TEACHER, STUDENT)
    *listed, sampled_2N = _choose(
        student_NV, teacher_NV, terms, sampled_ids_N, rows, top_k, rankings
    )
    if has_swept:
        listed = _behind(_teachers_list(terms.picked, rows, top_k), *listed)
    counts_2N = torch.stack(
        [
            _count_above(student_NV, sampled_2N[STUDENT], terms),
            _count_above(teacher_NV, sampled_2N[TEACHER], terms),
        ]
    )
    student_rank_N, teacher_rank_N = _over_shards(counts_2N, terms).unbind()
    return TokenDetails(student_rank_N, teacher_rank_N, *listed)


@torch.no_grad()
def details_of_top_k(
    student_NV: torch.Tensor,
    teacher: TeacherTopK,
    terms: TopKTerms,
    sampled_ids_N: torch.Tensor,
    rows: slice,
    *,
    top_k: int,
) -> TokenDetails:
    """As details_of_logits, as far as the teacher's top k tells."""
    student_NV, sampled_ids_N = student_NV[rows], sampled_ids_N[rows]
    ids_NK, student_NK, _, sampled_2N = _choose(
        student_NV, student_NV, terms, sampled_ids_N, rows, top_k, (STUDENT,)
    )
    rank_N = _over_shards(_count_above(student_NV, sampled_2N[STUDENT], terms), terms)
    told_ids_NT = teacher.ids_NK[rows].where(teacher.valid_NK[rows], -1)
    is_told_NKT = ids_NK.unsqueeze(-1) == told_ids_NT.unsqueeze(-2)
    teacher_NK = (is_told_NKT * teacher.logprobs_NK[rows].unsqueeze(-2)).sum(-1)
    teacher_NK = teacher_NK.where(is_told_NKT.any(-1), torch.nan)
    is_sampled_NT = told_ids_NT == sampled_ids_N.unsqueeze(-1)
    places_T = torch.arange(1, told_ids_NT.shape[-1] + 1, device=student_NV.device)
    return TokenDetails(
        rank_N,
        (is_sampled_NT * places_T).sum(-1, dtype=torch.int32),
        *_behind(_teachers_list(terms.picked, rows, top_k), ids_NK, student_NK, teacher_NK),
    )


Listed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Ids, −1 of none, and both models' log-probabilities, each [N, top_k]."""


def _teachers_list(picked: PickedTokens, rows: slice, top_k: int) -> Listed:
    """As many as the sweep has found of them."""
    columns = slice(0, top_k)
    missing = (0, max(top_k - picked.top_ids.shape[-1], 0))
    ids_NK = picked.top_ids.where(picked.top_valid, -1)[rows, columns]
    logprobs = (picked.top_student_logprobs, picked.top_teacher_logprobs)
    return (
        pad(ids_NK, missing, value=-1),
        *(pad(x[rows, columns], missing, value=torch.nan) for x in logprobs),
    )


def _behind(teachers: Listed, *students: torch.Tensor) -> Listed:
    """The student's list behind the teacher's, without what that has already."""
    is_known_NKK = students[0].unsqueeze(-1) == teachers[0].unsqueeze(-2)
    new_NK = students[0].where(~is_known_NKK.any(-1), -1)
    pairs = zip(teachers, (new_NK, *students[1:]), strict=True)
    return tuple(torch.cat(pair, dim=-1) for pair in pairs)


def _choose(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    terms: TokenTerms | TopKTerms,
    sampled_ids_N: torch.Tensor,
    rows: slice,
    top_k: int,
    rankings: tuple[int, ...],
) -> tuple[torch.Tensor, ...]:
    """Ids, −1 of none, and both models' log-probabilities, each [N, K], of the rankings one behind
    the other; and both models' logits of the sampled token, [2, N]."""
    vocabulary = terms.vocabulary
    support = next(name for name, whose in RANKED_BY.items() if whose == rankings)
    pick = Pick(sampled_ids_N, top_k, support)
    teachers_top = None
    if TEACHER in rankings:
        teachers_top = top_k_of_rows(teacher_NV[:, : vocabulary.num_columns], top_k)
    candidates_NW = pack_candidates(student_NV, teacher_NV, vocabulary, teachers_top, pick)
    gathered_RNW = all_gather(candidates_NW, vocabulary.tp_group)
    log_z = LogPartition(*(x[rows] for x in terms.log_z))
    chosen = choose_tokens(gathered_RNW, pick, log_z, vocabulary.temperatures)
    ids_NK, student_NK, teacher_NK, valid_NK = (x[:, 1:] for x in chosen)  # behind the sampled one
    return ids_NK.where(valid_NK, -1), student_NK, teacher_NK, gathered_RNW[..., :2].amax(0).T


def _count_above(
    logits_NV: torch.Tensor, sampled_N: torch.Tensor, terms: TokenTerms | TopKTerms
) -> torch.Tensor:
    """int32 [N]: columns of this shard with a larger logit."""
    counts_N = torch.zeros_like(sampled_N, dtype=torch.int32)
    real_NV = logits_NV[:, : terms.vocabulary.num_columns]
    for rows in row_chunks(real_NV):
        counts_N[rows] = (real_NV[rows] > sampled_N[rows].unsqueeze(-1)).sum(-1, dtype=torch.int32)
    return counts_N


def _over_shards(counts: torch.Tensor, terms: TokenTerms | TopKTerms) -> torch.Tensor:
    """Ranks, from the counts of all shards."""
    if terms.vocabulary.tp_group is not None:
        dist.all_reduce(counts, group=terms.vocabulary.tp_group)
    return counts + 1
