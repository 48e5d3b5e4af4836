"""A quantile of values on several ranks is one of the values, found without gathering them."""

import math
from fractions import Fraction

import torch
import torch.distributed as dist

from megatron_eopd.parallel.quantile import spread_quantile
from tests.ranks import run_ranks

FRACTIONS = (0.0, 0.07, 0.1, 0.5, 0.6, 0.8, 0.95, 1.0)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    entropies = torch.rand(3001, generator=generator) ** 4 * 11
    near = 1.0 + torch.arange(500) * 2.0**-23  # they differ in their last bits only
    signed = torch.randn(101, generator=generator)
    ties = torch.tensor([0.5] * 7 + [0.25] * 4 + [-0.0, 0.0])
    return [entropies, near, signed, ties, torch.tensor([0.3]), torch.tensor([1.0, math.inf])]


def check_quantiles() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for values in batches():
        # Of uneven parts, and of none on the last rank.
        own = values[rank :: world - 1] if rank < world - 1 else values[:0]
        for fraction in FRACTIONS:
            found = spread_quantile(own, fraction, dist.group.WORLD)
            # torch.quantile rounds 0.07 · 3000 up to 210.00000000000003, and asks for the next one.
            place = math.ceil(Fraction(str(fraction)) * (len(values) - 1))
            exact = values.sort().values[place]
            assert found.shape == () and torch.equal(found, exact), (fraction, found, exact)


def test_a_quantile_is_exact(tmp_path):
    """To the bit the value with that rank among all values together."""
    run_ranks(3, tmp_path, check_quantiles)


def check_nan() -> None:
    values = torch.tensor([1.0, -math.nan, 2.0])
    assert spread_quantile(values, 0.5, dist.group.WORLD) == 2.0
    assert spread_quantile(values, 1.0, dist.group.WORLD).isnan()


def test_nan_is_larger_than_any_number(tmp_path):
    run_ranks(1, tmp_path, check_nan)
