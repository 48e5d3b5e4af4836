"""Sequences behind one another in one row, and which part of them a context-parallel rank holds.

In: the sequences' lengths. Out: what attention and rotary embeddings must know to keep them apart.
Context parallelism cuts each sequence into 2 · cp chunks and gives rank r the chunks r and
2 · cp − 1 − r, so that every rank has as much causal attention to compute (Megatron's order).
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from megatron_eopd.records import PackedSequences, Unpacking


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
    positions = [position for length in lengths for position in positions_of(length, cp, cp_rank)]
    ends, positions_S = on_device(device, torch.int64, [0, *accumulate(lengths)], positions)
    ends = ends.int()  # what flash attention and TransformerEngine read
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=tuple(lengths),
        positions_S=positions_S,
    )


def unpacking_of(packed: PackedSequences, cp: int, cp_rank: int) -> Unpacking:
    lengths = packed.lengths
    longest, num_local = max(lengths), sum(lengths) // cp
    starts = [0, *accumulate(lengths)]
    # Each rank has the same number of a sequence's tokens, one block of its row.
    rows, positions, keys, slots = [], [], [], []
    for sequence, length in enumerate(lengths):
        first, missing = starts[sequence] // cp, (longest - length) // cp
        rows += [*range(first, first + length // cp), *[0] * missing]
        positions += [*positions_of(length, cp, cp_rank), *[0] * missing]
        slots += range(sequence * (longest // cp), sequence * (longest // cp) + length // cp)
        row_at = [0] * longest
        for rank in range(cp):
            for row, chunk in chunks_of(length, cp, rank):
                begin = rank * num_local + first + row
                row_at[chunk.start : chunk.stop] = range(begin, begin + len(chunk))
        keys += row_at
    device = packed.positions_S.device
    query_rows, query_positions, key_rows, slots_S = on_device(
        device, torch.int64, rows, positions, keys, slots
    )
    return Unpacking(
        query_rows.view(len(lengths), -1),
        query_positions.view(len(lengths), -1),
        key_rows.view(len(lengths), -1),
        slots_S,
    )


def on_device(
    device: torch.device, dtype: torch.dtype, *columns: Sequence[float]
) -> tuple[torch.Tensor, ...]:
    """The columns as tensors, by one copy for all of them, which a GPU's host does not wait for."""
    flat = torch.tensor(
        [value for column in columns for value in column],
        dtype=dtype,
        pin_memory=device.type == "cuda",
    )
    flat = flat.to(device, non_blocking=True)
    return flat.split([len(column) for column in columns])
