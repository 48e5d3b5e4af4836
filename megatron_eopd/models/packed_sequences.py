"""Sequences behind one another in one row, and which part of them a context-parallel rank holds.

In: the sequences' lengths. Out: what attention and rotary embeddings must know to keep them apart.
Context parallelism cuts each sequence into 2 · cp chunks and gives rank r the chunks r and
2 · cp − 1 − r, so that every rank has as much causal attention to compute (Megatron's order).
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from megatron_eopd.records import PackedSequences


def chunks_of(length: int, cp: int, cp_rank: int) -> list[tuple[int, range]]:
    """(row, positions) of the chunks of a sequence that a rank holds; rows count from the first of
    the sequence. `length` must be a multiple of 2 · cp, where cp > 1."""
    if cp == 1:
        return [(0, range(length))]
    assert length % (2 * cp) == 0, f"sequence of {length} tokens, context parallel {cp}"
    size = length // (2 * cp)
    first, second = cp_rank * size, (2 * cp - 1 - cp_rank) * size
    return [(0, range(first, first + size)), (size, range(second, second + size))]


def positions_of(length: int, cp: int, cp_rank: int) -> list[int]:
    """Positions of a sequence's tokens on a rank, row by row."""
    return [position for _, chunk in chunks_of(length, cp, cp_rank) for position in chunk]


def describe_sequences(
    lengths: Sequence[int], cp: int, cp_rank: int, device: torch.device
) -> PackedSequences:
    longest, num_local = max(lengths), sum(lengths) // cp
    starts = [0, *accumulate(lengths)]
    # Each rank has the same number of a sequence's tokens, one block of its row.
    rows, positions, keys, slots = [], [], [], []
    for sequence, length in enumerate(lengths):
        first, missing = starts[sequence] // cp, (longest - length) // cp
        rows.append([*range(first, first + length // cp), *[0] * missing])
        positions.append([*positions_of(length, cp, cp_rank), *[0] * missing])
        slots += range(sequence * (longest // cp), sequence * (longest // cp) + length // cp)
        row_at = [0] * longest
        for rank in range(cp):
            for row, chunk in chunks_of(length, cp, rank):
                begin = rank * num_local + first + row
                row_at[chunk.start : chunk.stop] = range(begin, begin + len(chunk))
        keys.append(row_at)
    ends = torch.tensor(starts, dtype=torch.int32, device=device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        query_rows_BQ=torch.tensor(rows, device=device),
        query_positions_BQ=torch.tensor(positions, device=device),
        key_rows_BL=torch.tensor(keys, device=device),
        slots_S=torch.tensor(slots, device=device),
    )
