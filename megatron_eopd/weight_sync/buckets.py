"""Buckets on the wire. In: the tensors of one bucket. Out: one byte buffer, and back again.

Layout, known to both sides from the manifest alone: every tensor starts at a multiple of 16 bytes
(a view of another dtype needs its own alignment), gaps are zero, and one int64 checksum per tensor
follows the last of them.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import xxhash

from megatron_eopd.weight_sync.manifest import Bucket, TensorSpec

ALIGNMENT = 16
CHECKSUM_BYTES = 8
WORDS_PER_CHUNK = 1 << 22
"""Of a sum on a GPU: few large steps cost few launches."""


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def offsets(bucket: Bucket) -> list[int]:
    """Where each tensor starts; one more entry at the end, where the checksums start."""
    starts = [0]
    for spec in bucket:
        starts.append(starts[-1] + aligned(spec.num_bytes))
    return starts


def buffer_bytes(bucket: Bucket) -> int:
    return offsets(bucket)[-1] + CHECKSUM_BYTES * len(bucket)


def pack(bucket: Bucket, tensors: Sequence[torch.Tensor], buffer: torch.Tensor) -> None:
    """Fill `buffer`, of buffer_bytes(bucket), with the bucket's bytes, checksums last.

    Raises:
        ValueError: a tensor is missing, or is not what the manifest says.
    """
    check_tensors(bucket, tensors)
    starts = offsets(bucket)
    views = [_view(buffer, spec, at) for spec, at in zip(bucket, starts, strict=False)]
    torch._foreach_copy_(views, [tensor.detach() for tensor in tensors])
    for spec, (start, end) in zip(bucket, pairwise(starts), strict=True):
        if start + spec.num_bytes < end:
            buffer[start + spec.num_bytes : end] = 0
    _checksums_of(buffer, bucket).copy_(_compute_checksums(buffer, bucket))


def unpack(bucket: Bucket, buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor, as views of `buffer`.

    Raises:
        ValueError: a checksum does not match; the message names the tensors.
    """
    received, computed = _checksums_of(buffer, bucket), _compute_checksums(buffer, bucket)
    wrong = (received != computed).nonzero().flatten().tolist()
    if wrong:
        names = ", ".join(bucket[i].name for i in wrong)
        raise ValueError(
            f"{len(wrong)} of {len(bucket)} tensors arrived changed, by their checksums: {names}"
        )
    starts = offsets(bucket)
    return [(s.name, _view(buffer, s, at)) for s, at in zip(bucket, starts, strict=False)]


def check_tensors(bucket: Bucket, tensors: Sequence[torch.Tensor]) -> None:
    if len(tensors) != len(bucket):
        raise ValueError(
            f"a bucket of {len(tensors)} tensors where the manifest has {len(bucket)}: "
            f"{', '.join(spec.name for spec in bucket)}"
        )
    for spec, tensor in zip(bucket, tensors, strict=True):
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.torch_dtype:
            raise ValueError(
                f"{spec.name} is {tensor.dtype} {tuple(tensor.shape)}, and the manifest says "
                f"{spec.torch_dtype} {spec.shape}"
            )


def checksums(data: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
    """Of each part of `data` (uint8), which begin at these multiples of 8 and end at the last: an
    int64 that changes with any byte of the part and with the order of its words.

    Writer and readers have their memory on the same kind of device, and each kind has its own sums:
    XXH3 on a CPU, where it is faster than a copy, and arithmetic on a GPU.
    """
    if data.device.type == "cuda":
        return weighted_sums(data, starts)
    view = memoryview(data.numpy())
    parts = [view[a:b] for a, b in pairwise(starts)]
    return torch.tensor([xxhash.xxh3_64_intdigest(part) - (1 << 63) for part in parts])


def weighted_sums(data: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
    """Σ mix(w_i) · (2i + 1) over the int64 words of each part, w_i the i-th of `data`, in integers
    that wrap around.

    An odd factor never loses a change of one word, and folding the upper half of a word into the
    lower keeps exchanged words apart that differ in the top bit alone, the sign of a float. Sums of
    parts are differences of a running sum: a few launches, however many parts there are.
    """
    words = data.view(torch.int64)
    bounds = torch.tensor(starts, device=data.device) // 8
    totals = torch.zeros(len(starts) - 1, dtype=torch.int64, device=data.device)
    odd = torch.arange(min(WORDS_PER_CHUNK, words.numel()), device=data.device).mul_(2).add_(1)
    for first in range(0, words.numel(), WORDS_PER_CHUNK):
        chunk = words[first : first + WORDS_PER_CHUNK]
        mixed = (chunk >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(chunk)
        mixed.mul_(odd[: chunk.numel()] + 2 * first)
        running = torch.nn.functional.pad(mixed.cumsum(0), (1, 0))
        at = running[(bounds - first).clamp(0, chunk.numel())]
        totals += at[1:] - at[:-1]
    return totals


def _compute_checksums(buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    starts = offsets(bucket)
    return checksums(buffer[: starts[-1]], starts)


def _checksums_of(buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    return buffer[offsets(bucket)[-1] :].view(torch.int64)


def _view(buffer: torch.Tensor, spec: TensorSpec, start: int) -> torch.Tensor:
    num_bytes = math.prod(spec.shape) * spec.torch_dtype.itemsize
    return buffer[start : start + num_bytes].view(spec.torch_dtype).view(spec.shape)
