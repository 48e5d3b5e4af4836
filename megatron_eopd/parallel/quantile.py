"""The exact quantile of values that are spread over ranks. In: this rank's. Out: one of them all.

Radix selection on the bits of float32: two histograms of 2^16 bins and two all-reduces find the
value itself. Nobody gathers the values, and nothing waits for the device.
"""
# Shapes: N values of this rank, D = 2^16 digits.

import torch
import torch.distributed as dist

DIGITS = 1 << 16
SIGN = 1 << 31


def spread_quantile(
    values_N: torch.Tensor, fraction: float, group: dist.ProcessGroup
) -> torch.Tensor:
    """Scalar float32, on the values' device: as torch.quantile(…, interpolation="higher") of the
    values of all ranks, of which there must be one; NaN counts as larger than any number.

    Two all-reduces of [65536] int64.
    """
    keys_N = _sortable(values_N)
    is_asked_N = torch.ones_like(keys_N)
    high_D = _counts(keys_N // DIGITS, is_asked_N, group)
    # A little less, or the rounding of 0.07 · 100 to 7.000000000000001 would ask for the eighth.
    rank = ((high_D.sum() - 1).double() * fraction - 1e-6).ceil().clamp(min=0).long()
    high, before = _digit_at(rank, high_D)
    is_asked_N = (keys_N // DIGITS == high).long()
    low, _ = _digit_at(rank - before, _counts(keys_N % DIGITS, is_asked_N, group))
    return _value_of(high * DIGITS + low)


def _sortable(values_N: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2^32), in the order of the float32 values; −0.0 is 0.0."""
    values_N = values_N.float() + 0.0
    values_N = torch.where(values_N.isnan(), torch.nan, values_N)  # one without a sign
    bits_N = values_N.view(torch.int32).long()
    # Negative floats sort backwards as integers: their magnitude bits are turned round.
    return torch.where(bits_N < 0, bits_N ^ 0x7FFFFFFF, bits_N) + SIGN


def _value_of(key: torch.Tensor) -> torch.Tensor:
    bits = key - SIGN
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)


def _counts(
    digits_N: torch.Tensor, is_asked_N: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """int64 [D], over all ranks."""
    counts_D = torch.zeros(DIGITS, dtype=torch.int64, device=digits_N.device)
    counts_D.scatter_add_(0, digits_N, is_asked_N)
    dist.all_reduce(counts_D, group=group)
    return counts_D


def _digit_at(rank: torch.Tensor, counts_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(digit, how many values come before those that have it) of the value with this rank."""
    ends_D = counts_D.cumsum(0)
    # Of no values there is none, and any answer will do but an index out of bounds.
    digit = torch.searchsorted(ends_D, rank, right=True).clamp(max=len(counts_D) - 1)
    # gather, and not an index: that would ask for the number.
    at = digit.view(1)
    return digit, (ends_D.gather(0, at) - counts_D.gather(0, at)).squeeze(0)
