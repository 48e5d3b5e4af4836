"""Sequences behind one another in one row, and which part of them a context-parallel rank holds.

In: the sequences' lengths. Out: what attention and rotary embeddings must know to keep them apart.
Context parallelism cuts each sequence into 2 · cp chunks and gives rank r the chunks r and
2 · cp − 1 − r, so that every rank has as much causal attention to compute (Megatron's order).
"""
# Shapes: B sequences, L longest of them, S tokens of this rank, Q longest part of a sequence on
# this rank, R context-parallel ranks.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


def local_tokens(lengths: Sequence[int], cp: int, cp_rank: int) -> tuple[torch.Tensor, ...]:
    """(sequence [S], position in it [S]) of every token of a rank, in the order of its row.

    `lengths` must be multiples of 2 · cp, where cp > 1.
    """
    sequences, positions = [], []
    for sequence, length in enumerate(lengths):
        position = torch.arange(length)
        if cp > 1:
            assert length % (2 * cp) == 0, f"sequence of {length} tokens, context parallel {cp}"
            chunks = position.chunk(2 * cp)
            position = torch.cat([chunks[cp_rank], chunks[2 * cp - 1 - cp_rank]])
        positions.append(position)
        sequences.append(torch.full_like(position, sequence))
    return torch.cat(sequences), torch.cat(positions)


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description, and the indices by which our own attention unpacks the row."""

    query_rows_BQ: torch.Tensor | None = None
    """Row of each of this rank's tokens, by sequence; any row where a sequence has none."""
    query_positions_BQ: torch.Tensor | None = None
    key_rows_BL: torch.Tensor | None = None
    """The same for all tokens, as rows of the ranks' rows behind one another, [R · S]."""
    slots_S: torch.Tensor | None = None
    """Where each of this rank's tokens is in a flattened [B · Q]."""

    @classmethod
    def of_lengths(
        cls, lengths: Sequence[int], cp: int, cp_rank: int, device: torch.device
    ) -> "PackedSequences":
        ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        longest = max(lengths)
        ranks = [local_tokens(lengths, cp, rank) for rank in range(cp)]
        sequence_S, position_S = ranks[cp_rank]
        num_local = len(sequence_S)
        # Each rank has the same number of a sequence's tokens, one block of its row.
        within_S = torch.cat([torch.arange(length // cp) for length in lengths])
        query_rows_BQ = torch.zeros(len(lengths), longest // cp, dtype=torch.long)
        query_rows_BQ[sequence_S, within_S] = torch.arange(num_local)
        query_positions_BQ = torch.zeros_like(query_rows_BQ)
        query_positions_BQ[sequence_S, within_S] = position_S
        key_rows_BL = torch.zeros(len(lengths), longest, dtype=torch.long)
        for rank, (sequence, position) in enumerate(ranks):
            key_rows_BL[sequence, position] = torch.arange(num_local) + rank * num_local
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            query_rows_BQ=query_rows_BQ.to(device),
            query_positions_BQ=query_positions_BQ.to(device),
            key_rows_BL=key_rows_BL.to(device),
            slots_S=(sequence_S * (longest // cp) + within_S).to(device),
        )
