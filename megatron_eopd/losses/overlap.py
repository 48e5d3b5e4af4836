"""How far both models' top k are the same tokens. In: what a sweep has listed of one model's top k,
and the other model's logits. Out: Overlap, without gradient, the same on every rank.

Costs a pass over the other model's logits and one all-gather of [N, 2·k], so only for who asks.
Beside what is gathered, a few dozen bytes for each of `entries_at_once`, however many tokens there
are: some 10 MB on CPU, 0.2 GB on GPU.
"""
# Shapes: N tokens, C of them in a chunk, V this rank's columns of the vocabulary, K top-k,
# R tensor-parallel ranks.

from collections.abc import Iterator
from typing import NamedTuple

import torch

from megatron_eopd.losses.kernels import LOWEST
from megatron_eopd.losses.picked_tokens import PickedTokens
from megatron_eopd.losses.shards import Vocabulary, all_gather
from megatron_eopd.losses.top_k import BLOCK, top_k_of_rows


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
    own_N2K = _own_candidates(other_logits_NV, top_k, vocabulary)
    gathered_RN2K = all_gather(own_N2K, vocabulary.tp_group)
    is_shared_NK = torch.empty_like(valid_NK)
    for rows in _row_chunks(ids_NK, top_k * max(top_k, len(gathered_RN2K))):
        others_CK = _best_ids(gathered_RN2K[:, rows], top_k)
        is_same_CKK = ids_NK[rows].unsqueeze(-1) == others_CK.unsqueeze(-2)
        is_shared_NK[rows] = is_same_CKK.any(-1) & valid_NK[rows]

    def mass(logprobs_NK: torch.Tensor) -> torch.Tensor:
        return (logprobs_NK[:, :top_k].exp() * is_shared_NK).sum(-1)

    return Overlap(
        is_shared_NK.float().mean(-1),
        mass(picked.top_teacher_logprobs),
        mass(picked.top_student_logprobs),
    )


def _own_candidates(logits_NV: torch.Tensor, top_k: int, vocabulary: Vocabulary) -> torch.Tensor:
    """[N, 2, K] float32: largest logits of this shard and their ids, by the rule of top_k.py."""
    real_NV = logits_NV[:, : vocabulary.num_columns]
    found_N2K = real_NV.new_empty((len(real_NV), 2, top_k), dtype=torch.float32)
    # What top_k_of_rows orders of a row: all of it, or blocks.
    width = min(vocabulary.num_columns, (2 * top_k + 1) * BLOCK)
    for rows in _row_chunks(real_NV, width):
        values_CK, columns_CK = top_k_of_rows(real_NV[rows], top_k)
        found_N2K[rows, 0] = values_CK
        # Ids travel as float32, exact up to picked_tokens.MOST_IDS.
        found_N2K[rows, 1] = columns_CK + vocabulary.first_column
    return found_N2K


def _best_ids(gathered_RC2K: torch.Tensor, top_k: int) -> torch.Tensor:
    """int64 [C, K], of all ranks' candidates; −1 where fewer tokens have a finite logit."""
    # Ranks hold rising ids and each lists equal logits by id, so here too the lowest id wins.
    values_CRK, ids_CRK = gathered_RC2K.permute(2, 1, 0, 3).flatten(-2)
    values_CK, best_CK = top_k_of_rows(values_CRK, top_k)
    return ids_CRK.gather(-1, best_CK).long().where(values_CK > LOWEST, -1)


def entries_at_once(device: torch.device) -> int:
    """Logits that are put in order at once, or pairs of ids that are compared."""
    # Fewer than a sweep takes: each needs a key of 8 bytes, and copies of it.
    return 1 << (18 if device.type == "cpu" else 22)


def _row_chunks(rows: torch.Tensor, entries_of_row: int) -> Iterator[slice]:
    step = max(1, entries_at_once(rows.device) // max(1, entries_of_row))
    return (slice(first, first + step) for first in range(0, len(rows), step))
