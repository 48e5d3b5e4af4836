"""Where tensors lie in page-locked host memory."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_eopd.host_memory import ALIGNMENT, arrange, host_memory_like, in_blocks


@given(st.lists(st.integers(0, 5000), max_size=30))
def test_tensors_lie_beside_one_another_in_blocks_that_are_nearly_full(sizes):
    """Blocks are powers of two, none overlaps another's bytes, and together they are less than
    twice what is asked for: that much a power of two for each tensor may take."""
    blocks, places = arrange(sizes)
    assert all(block & (block - 1) == 0 for block in blocks)
    taken = set()
    for size, place in zip(sizes, places, strict=True):
        assert place.offset % ALIGNMENT == 0 and place.offset + size <= blocks[place.block]
        own = {(place.block, byte) for byte in range(place.offset, place.offset + size)}
        assert not own & taken
        taken |= own
    padded = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    assert sum(blocks) <= 2 * padded + 1


def test_a_checkpoint_and_a_teacher_waste_next_to_nothing():
    """Qwen3-0.6B's optimizer in pieces of 32 MiB at most, and Qwen3-8B's layers with an LM head of
    their own, which in powers of two of their own would take 1.3 times as much."""
    matrices = [12288 * 4096 * 4, 4096 * 12288 * 2, 6144 * 4096 * 2, 4096 * 4096 * 2, 4096 * 2]
    teacher = [151_936 * 4096 * 2] * 2 + matrices * 36
    pieces = [31 * 2**20, 17 * 2**20, 12 * 2**20, 9 * 2**20, 4096] * 100
    for sizes in (teacher, pieces):
        blocks, _ = arrange(sizes)
        assert sum(blocks) < 1.01 * sum(sizes)
        assert sum(1 << (size - 1).bit_length() for size in sizes) > 1.25 * sum(sizes)


def test_on_a_cpu_there_is_no_gain_from_blocks():
    """Each tensor has memory of its own, of its shape and type."""
    tensors = [torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(0), torch.tensor(2.0)]
    for tensor, memory in zip(tensors, host_memory_like(tensors), strict=True):
        assert memory.shape == tensor.shape and memory.dtype == tensor.dtype
        assert memory.data_ptr() != tensor.data_ptr() or tensor.numel() == 0


def test_what_is_copied_into_blocks_stays_what_it_is():
    """Shapes and types, an empty tensor and a single number among them; and each tensor's bytes
    are its own."""
    tensors = [torch.randn(3, 5).bfloat16(), torch.ones(0, 4), torch.tensor(2.0), torch.arange(9)]
    copies = in_blocks(tensors, pin_memory=False)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
