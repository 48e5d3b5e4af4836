"""Buckets on the wire. In: the tensors of one bucket. Out: one byte buffer, and back again.

Layout, known to both sides from the manifest alone: every tensor starts at a multiple of 16 bytes
(a view of another dtype needs its own alignment), gaps are zero, and one int64 checksum per tensor
follows the last of them.
"""

import math
from collections.abc import Sequence

import torch

from megatron_eopd.weight_sync.manifest import Bucket, TensorSpec

ALIGNMENT = 16
CHECKSUM_BYTES = 8
# Words per step of the checksum. On CPU its temporaries stay in the cache, which made it 5 times as
# fast as steps of 8 MiB; on GPU few large steps cost fewer launches.
CPU_WORDS_PER_CHUNK = 1 << 16
GPU_WORDS_PER_CHUNK = 1 << 22


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


def pack(bucket: Bucket, tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The bucket's bytes on `device`, checksums last.

    Raises:
        ValueError: a tensor is missing, or is not what the manifest says.
    """
    check_tensors(bucket, tensors)
    buffer = torch.empty(buffer_bytes(bucket), dtype=torch.uint8, device=device)
    starts = offsets(bucket)
    for i, (spec, tensor) in enumerate(zip(bucket, tensors, strict=True)):
        _view(buffer, spec, starts[i]).copy_(tensor.detach())
        buffer[starts[i] + spec.num_bytes : starts[i + 1]] = 0
    _checksums_of(buffer, bucket).copy_(_compute_checksums(buffer, bucket))
    return buffer


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


def checksum(data: torch.Tensor) -> torch.Tensor:
    """An int64 that changes with any byte of `data` (uint8, a multiple of 8 long) and with the
    order of its words. Integer arithmetic that wraps around, so CPU and GPU agree.

    Σ mix(w_i) · (2i + 1): an odd factor never loses a change of one word, and folding the upper
    half of a word into the lower keeps exchanged words apart that differ in the top bit alone,
    which is the sign of a float.
    """
    words = data.view(torch.int64)
    step = CPU_WORDS_PER_CHUNK if data.device.type == "cpu" else GPU_WORDS_PER_CHUNK
    odd = torch.arange(min(step, words.numel()), device=data.device).mul_(2).add_(1)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, words.numel(), step):
        chunk = words[start : start + step]
        mixed = (chunk >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(chunk)
        # 2·(start + i) + 1, in two parts: the factors of one chunk serve all.
        total += 2 * start * mixed.sum() + mixed.mul_(odd[: chunk.numel()]).sum()
    return total


def _compute_checksums(buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    starts = offsets(bucket)
    sums = [checksum(buffer[starts[i] : starts[i + 1]]) for i in range(len(bucket))]
    return torch.stack(sums)


def _checksums_of(buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    return buffer[offsets(bucket)[-1] :].view(torch.int64)


def _view(buffer: torch.Tensor, spec: TensorSpec, start: int) -> torch.Tensor:
    num_bytes = math.prod(spec.shape) * spec.torch_dtype.itemsize
    return buffer[start : start + num_bytes].view(spec.torch_dtype).view(spec.shape)
