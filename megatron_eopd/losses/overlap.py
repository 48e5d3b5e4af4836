"""How far both models' top k are the same tokens. In: what a sweep has listed of one model's top k,
and the other model's logits. Out: Overlap, without gradient, the same on every rank.

Costs a pass over the other model's logits and one all-gather of [N, 2·k], so only for who asks.
"""
# Shapes: N tokens, V this rank's columns of the vocabulary, K top-k, R tensor-parallel ranks.

from typing import NamedTuple

import torch

from megatron_eopd.losses.kernels import LOWEST
from megatron_eopd.losses.picked_tokens import PickedTokens
from megatron_eopd.losses.shards import Vocabulary, all_gather
from megatron_eopd.losses.top_k import top_k_of_rows


class Overlap(NamedTuple):
    """Of top_k(p) ∩ top_k(q), p the teacher, q the student. Each float32 [N]."""

    share: torch.Tensor
    """How many tokens it has, by k."""
    teacher_mass: torch.Tensor
    """Σ p over it."""
    student_mass: torch.Tensor
    """Σ q over it."""


@torch.no_grad()
def top_k_overlap(
    picked: PickedTokens, other_logits_NV: torch.Tensor, top_k: int, vocabulary: Vocabulary
) -> Overlap:
    """`picked`: its first `top_k` tokens are the top k of one model, either of the two;
    `other_logits_NV`: those of the other model. `top_k` is at most the size of the vocabulary."""
    ids_NK, valid_NK = picked.top_ids[:, :top_k], picked.top_valid[:, :top_k]
    others_NK = _top_ids(other_logits_NV, top_k, vocabulary)
    is_shared_NK = (ids_NK.unsqueeze(-1) == others_NK.unsqueeze(-2)).any(-1) & valid_NK

    def mass(logprobs_NK: torch.Tensor) -> torch.Tensor:
        return (logprobs_NK[:, :top_k].exp() * is_shared_NK).sum(-1)

    return Overlap(
        is_shared_NK.float().mean(-1),
        mass(picked.top_teacher_logprobs),
        mass(picked.top_student_logprobs),
    )


def _top_ids(logits_NV: torch.Tensor, top_k: int, vocabulary: Vocabulary) -> torch.Tensor:
    """int64 [N, K], by the rule of top_k.py; −1 where fewer tokens have a finite logit."""
    values_NK, columns_NK = top_k_of_rows(logits_NV[:, : vocabulary.num_columns], top_k)
    ids_NK = columns_NK + vocabulary.first_column
    # Ids travel as float32, exact up to picked_tokens.MOST_IDS.
    gathered_RN2K = all_gather(torch.stack([values_NK, ids_NK.float()], dim=1), vocabulary.tp_group)
    # Ranks hold rising ids and each lists equal logits by id, so here too the lowest id wins.
    values_NRK, ids_NRK = gathered_RN2K.permute(2, 1, 0, 3).flatten(-2)
    values_NK, best_NK = top_k_of_rows(values_NRK, top_k)
    return ids_NRK.gather(-1, best_NK).long().where(values_NK > LOWEST, -1)
