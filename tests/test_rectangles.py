"""A range of a flat tensor as rectangles of the tensor: all of it, once, contiguous, in order."""

import math
import random

import pytest
import torch

from megatron_eopd.checkpoints.contents import rectangles

SHAPES = [(), (7,), (3, 5), (1, 9), (4, 1), (3, 4, 5), (2, 1, 3, 2)]


@pytest.mark.parametrize("max_elements", [1, 4, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_range_of_every_shape(shape, max_elements):
    flat = torch.arange(math.prod(shape))
    tensor = flat.view(shape)
    for start in range(flat.numel() + 1):
        for stop in range(start, flat.numel() + 1):
            found = []
            for offset, sizes, at in rectangles(shape, start, stop, max_elements):
                part = tensor[tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))]
                assert part.shape == sizes and part.is_contiguous()
                assert torch.equal(part.reshape(-1), flat[at : at + part.numel()])
                found += part.reshape(-1).tolist()
            assert found == list(range(start, stop))


def test_pieces_are_no_larger_than_asked_for_and_few():
    """Two ragged rows, and whole rows in pieces."""
    shape, rng = (1000, 64), random.Random(0)
    for _ in range(50):
        start, stop = sorted(rng.sample(range(64_001), 2))
        pieces = list(rectangles(shape, start, stop, max_elements=6400))
        assert all(math.prod(sizes) <= 6400 for _, sizes, _ in pieces)
        assert len(pieces) <= 2 + math.ceil((stop - start) / 6400)
