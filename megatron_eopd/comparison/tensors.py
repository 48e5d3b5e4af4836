"""How far two tensors are apart, and how that is told."""

import math
from collections.abc import Set

import torch

from megatron_eopd.comparison.parts import SHOWN


class Extent:
    """Of two tensors that are read piece by piece: their largest value and largest difference."""

    def __init__(self) -> None:
        self.value = self.difference = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Infinitely far apart where one of the two alone is not finite."""
        if not x.numel():
            return
        x, y = x.double(), y.double()
        apart = (x - y).masked_fill((x == y) | (x.isnan() & y.isnan()), 0).abs()
        self.difference = max(self.difference, apart.nan_to_num(math.inf).max().item())
        largest = (tensor.nan_to_num(0, 0, 0).abs().max().item() for tensor in (x, y))
        self.value = max(self.value, *largest)

    @property
    def relative(self) -> float:
        return self.difference / self.value if self.difference and self.value else self.difference


def keys_alone(label: str, keys: Set[str]) -> list[str]:
    return [f"only {label} has {len(keys)} tensor(s), {min(keys)}"] if keys else []


def worst_first(off: list[tuple[float, str]]) -> list[str]:
    """`off`: (relative difference, name)."""
    lines = [f"{name}: relative {difference:.3g}" for difference, name in sorted(off)[::-1]]
    rest = [f"… and {len(lines) - SHOWN} more, by less"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + rest
