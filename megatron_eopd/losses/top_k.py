"""The k largest entries of each row, equal ones in the order of their columns.

PyTorch's topk leaves the order of equal entries open, and bfloat16 logits are full of them: without
a rule the support of a top-k loss would depend on how the vocabulary was cut.
"""
# Shapes: N rows, V columns, C candidates, K = k.

import torch

from megatron_eopd.losses.kernels import LOWEST

BLOCK = 256
"""Wide rows are first cut down to the k blocks of this many columns that have the largest maxima:
no other block can hold one of the k largest entries."""


def top_k_of_rows(values_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [N, k] float32 descending, columns [N, k] int64); LOWEST and 0 past the row's end."""
    num_rows, width = values_NV.shape
    num_blocks = width // BLOCK
    if num_blocks <= 2 * k:
        columns = torch.arange(width, device=values_NV.device)
        return _top_k_of_candidates(values_NV, columns.expand(num_rows, -1), k)
    in_blocks = values_NV[:, : num_blocks * BLOCK].unflatten(-1, (num_blocks, BLOCK))
    best_NK = _ordered(in_blocks.amax(-1)).topk(k, dim=-1).indices.sort(-1).values
    rows = torch.arange(num_rows, device=values_NV.device).unsqueeze(-1)
    columns = best_NK.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=values_NV.device)
    rest = torch.arange(num_blocks * BLOCK, width, device=values_NV.device).expand(num_rows, -1)
    candidates = torch.cat(
        [in_blocks[rows, best_NK].flatten(1), values_NV[:, num_blocks * BLOCK :]], dim=-1
    )
    return _top_k_of_candidates(candidates, torch.cat([columns.flatten(1), rest], dim=-1), k)


def _top_k_of_candidates(
    values_NC: torch.Tensor, columns_NC: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`columns_NC` rises along each row."""
    width = min(k, values_NC.shape[-1])
    at_NK = _ordered(values_NC).topk(width, dim=-1).indices
    found_NK = values_NC.gather(-1, at_NK).float().clamp(min=LOWEST)
    columns_NK = columns_NC.gather(-1, at_NK).where(found_NK > LOWEST, 0)
    padding = (0, k - width)
    return (
        torch.nn.functional.pad(found_NK, padding, value=LOWEST),
        torch.nn.functional.pad(columns_NK, padding),
    )


def _ordered(values_NV: torch.Tensor) -> torch.Tensor:
    """int64 keys that are all different and sort by (value, lower column first)."""
    # + 0.0 makes −0.0 and 0.0 one value.
    bits = (values_NV.float() + 0.0).view(torch.int32).long()
    # Negative floats sort backwards as integers: their magnitude bits are turned round.
    monotone = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    columns = torch.arange(values_NV.shape[-1], device=values_NV.device)
    return (monotone << 32) - columns
