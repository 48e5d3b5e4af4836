"""Likely alternatives of single tokens, and their ranks. In: both models' logits of some tokens,
and what the sweep said of them. Out: TokenDetails, without gradient.

Costs a pass over each model's logits for its top k and one for the rank, so only for the tokens
that are looked at.
"""
# Shapes: N tokens, V this rank's columns of the vocabulary, K twice the top k, R tensor-parallel
# ranks, W floats that travel.

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_eopd.losses.kernels.eager import row_chunks
from megatron_eopd.losses.picked_tokens import (
    RANKED_BY,
    STUDENT,
    TEACHER,
    Pick,
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
    """int64: 1 + how many tokens the student finds more likely than the sampled one."""
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
) -> TokenDetails:
    """Of the tokens `rows`. One all-gather and one all-reduce over the tensor-parallel group."""
    student_NV, teacher_NV = student_NV[rows], teacher_NV[rows]
    ids_NK, student_NK, teacher_NK, valid_NK, sampled_2N = _choose(
        student_NV, teacher_NV, terms, sampled_ids_N[rows], rows, top_k, (TEACHER, STUDENT)
    )
    ranks_2N = torch.stack(
        [
            _count_above(student_NV, sampled_2N[STUDENT], terms),
            _count_above(teacher_NV, sampled_2N[TEACHER], terms),
        ]
    )
    student_rank_N, teacher_rank_N = _over_shards(ranks_2N, terms).unbind()
    return TokenDetails(
        student_rank_N, teacher_rank_N, ids_NK.where(valid_NK, -1), student_NK, teacher_NK
    )


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
    teacher = TeacherTopK(*(x[rows] for x in teacher))
    ids_NK, student_NK, _, valid_NK, sampled_2N = _choose(
        student_NV, student_NV, terms, sampled_ids_N, rows, top_k, (STUDENT,)
    )
    rank_N = _over_shards(_count_above(student_NV, sampled_2N[STUDENT], terms), terms)
    teachers_own = slice(0, top_k)
    listed_NK = _padded(teacher.ids_NK.where(teacher.valid_NK, -1)[:, teachers_own], top_k, -1)
    known_NKT = (ids_NK.unsqueeze(-1) == teacher.ids_NK.unsqueeze(-2)) & teacher.valid_NK[:, None]
    of_teacher_NK = (known_NKT * teacher.logprobs_NK[:, None]).sum(-1)
    of_teacher_NK = of_teacher_NK.where(known_NKT.any(-1), torch.nan)
    is_new_NK = valid_NK & ~(ids_NK.unsqueeze(-1) == listed_NK.unsqueeze(-2)).any(-1)
    is_sampled_NT = (teacher.ids_NK == sampled_ids_N.unsqueeze(-1)) & teacher.valid_NK
    places_T = torch.arange(1, is_sampled_NT.shape[-1] + 1, device=student_NV.device)
    picked = terms.picked
    return TokenDetails(
        rank_N,
        (is_sampled_NT * places_T).sum(-1),
        torch.cat([listed_NK, ids_NK.where(is_new_NK, -1)], dim=-1),
        torch.cat(
            [_padded(picked.top_student_logprobs[rows, teachers_own], top_k), student_NK], dim=-1
        ),
        torch.cat(
            [_padded(picked.top_teacher_logprobs[rows, teachers_own], top_k), of_teacher_NK], dim=-1
        ),
    )


def _padded(values_NK: torch.Tensor, width: int, value: float = torch.nan) -> torch.Tensor:
    missing = width - values_NK.shape[-1]
    return torch.nn.functional.pad(values_NK, (0, missing), value=value)


def _choose(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    terms: TokenTerms | TopKTerms,
    sampled_ids_N: torch.Tensor,
    rows: slice,
    top_k: int,
    rankings: tuple[int, ...],
) -> tuple[torch.Tensor, ...]:
    """(ids, student and teacher log-probabilities, validity), each [N, K], of the rankings one
    behind the other, and both models' logits of the sampled token, [2, N]."""
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
    return *(x[:, 1:] for x in chosen), gathered_RNW[..., :2].amax(0).T


def _count_above(
    logits_NV: torch.Tensor, sampled_N: torch.Tensor, terms: TokenTerms | TopKTerms
) -> torch.Tensor:
    """int64 [N]: columns of this shard with a larger logit."""
    counts_N = torch.zeros_like(sampled_N, dtype=torch.int64)
    real_NV = logits_NV[:, : terms.vocabulary.num_columns]
    for rows in row_chunks(real_NV):
        counts_N[rows] = (real_NV[rows] > sampled_N[rows].unsqueeze(-1)).sum(-1)
    return counts_N


def _over_shards(counts: torch.Tensor, terms: TokenTerms | TopKTerms) -> torch.Tensor:
    """Ranks, from the counts of all shards."""
    if terms.vocabulary.tp_group is not None:
        dist.all_reduce(counts, group=terms.vocabulary.tp_group)
    return counts + 1
