"""Host memory for copies of tensors. In: the tensors. Out: as many on the host, their values not
yet copied.

For those on a GPU it is page-locked, which makes copies several times as fast. torch hands that out
in powers of two, so that memory of their own for tensors of 33 MiB would take 64 each. Here they
lie behind one another in a few blocks whose sizes are powers of two.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

ALIGNMENT = 64
"""Bytes: what a copy likes, and a multiple of every element's size."""


class Place(NamedTuple):
    block: int
    offset: int


def host_memory_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """
    Raises:
        RuntimeError: there is no more memory, or none that could be page-locked.
    """
    if any(tensor.is_cuda for tensor in tensors):
        return in_blocks(tensors, pin_memory=True)
    return [torch.empty_like(tensor, device="cpu") for tensor in tensors]


def in_blocks(tensors: Sequence[torch.Tensor], *, pin_memory: bool) -> list[torch.Tensor]:
    """Views of blocks, each of a tensor's shape and type."""
    sizes, places = arrange([tensor.nbytes for tensor in tensors])
    blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory) for size in sizes]
    return [
        blocks[place.block][place.offset :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, place in zip(tensors, places, strict=True)
    ]


def arrange(sizes: Sequence[int]) -> tuple[list[int], list[Place]]:
    """Bytes of each block, and where each tensor lies.

    The largest tensors first, each in the first block that has room. Else a block comes for what is
    left: no larger than that, so that nearly all of it is filled, unless a tensor needs it.
    """
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    left = sum(padded)
    blocks: list[int] = []
    filled: list[int] = []
    places: dict[int, Place] = {}
    for number in sorted(range(len(sizes)), key=lambda n: -padded[n]):
        size = padded[number]
        room = (b for b, block in enumerate(blocks) if block - filled[b] >= size)
        block = next(room, None)
        if block is None:
            block = len(blocks)
            blocks.append(max(_power_of_two_at_least(size), 1 << max(left.bit_length() - 1, 0)))
            filled.append(0)
        places[number] = Place(block, filled[block])
        filled[block] += size
        left -= size
    return blocks, [places[number] for number in range(len(sizes))]


def _power_of_two_at_least(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
