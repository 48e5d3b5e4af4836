"""What a rank has of a checkpoint. In: the student. Out: pieces of tensors, views of its memory.

Megatron's distributed optimizer cuts the flat memory of all parameters into equal shares, one for
each data-parallel rank, wherever that falls within a parameter. Megatron-Core's ways to store that
either gather everything on every rank or can be loaded at the same tensor- and pipeline-parallel
sizes alone. But a share of a flat tensor is a few rectangles of the tensor: the rest of a row,
whole rows, the start of a row. torch.distributed.checkpoint stores and finds rectangles. So each
rank writes what it has, under the keys and shapes that Megatron gives the whole tensors, and any
other layout reads what it needs.
"""

import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_eopd.models.mcore_files import CHUNK_BYTES, pieces_of
from megatron_eopd.models.mcore_writer import serialised
from megatron_eopd.training.optimizer import Trainable

MASTER, *MOMENTS = STATES = ("param", "exp_avg", "exp_avg_sq")
"""Megatron-Core's names of a parameter's float32 value and of Adam's moments."""


def optimizer_key(state: str, key: str) -> str:
    """As Megatron-Core's own formats have it."""
    return f"optimizer.state.{state}.{key}"


class Share(NamedTuple):
    """Of a parameter, in the distributed optimizer of this rank."""

    start: int
    stop: int
    """Within the parameter, flattened."""
    states: dict[str, torch.Tensor]
    """By STATES: flat tensors of that range, in float32."""


class Item(NamedTuple):
    """A parameter, or a buffer, that this rank has."""

    sharded: ShardedTensor | ShardedBase
    """Its place in the whole tensor, or tensors."""
    tensor: torch.Tensor
    share: Share | None
    """None where another rank optimizes it, or nobody."""
    is_optimized: bool


def items_of(student: Trainable) -> Iterator[Item]:
    shares = _shares(student)
    optimized = {p for chunk in student.chunks for p in chunk.parameters() if p.requires_grad}
    for chunk in student.chunks:
        for sharded in chunk.sharded_state_dict().values():
            if isinstance(sharded, ShardedObject):
                continue
            tensor = sharded.data
            yield Item(sharded, tensor, shares.get(tensor), tensor in optimized)


def objects_of(student: Trainable) -> dict[str, bytes]:
    """What Megatron's layers keep beside tensors, as far as this rank has to write it."""
    found = {}
    for chunk in student.chunks:
        for sharded in chunk.sharded_state_dict().values():
            if isinstance(sharded, ShardedObject) and not any(sharded.replica_id):
                found[sharded.unique_key] = serialised([sharded.data])
    return found


def _shares(student: Trainable) -> dict[torch.nn.Parameter, Share]:
    shares = {}
    for optimizer in distributed_optimizers(student):
        for by_dtype in optimizer.gbuf_ranges:
            for bucket in (bucket for buckets in by_dtype.values() for bucket in buckets):
                for parameter, ranges in bucket["param_map"].items():
                    own = ranges["param"]
                    states = optimizer._get_main_param_and_optimizer_states(parameter)
                    shares[parameter] = Share(own.start, own.end, _all_states(states))
    return shares


def _all_states(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By STATES. Before its first step Adam has no moments, which are then zero."""
    found = {MASTER: states[MASTER].detach()}
    for name in MOMENTS:
        found[name] = states[name] if name in states else torch.zeros_like(found[MASTER])
    return found


def distributed_optimizers(student: Trainable) -> Sequence[DistributedOptimizer]:
    """One for dense layers, and one for experts."""
    return student.optimizer.chained_optimizers


def pieces_to_write(item: Item) -> Iterator[ShardedTensor]:
    """Of all ranks together every element once: a parameter's by the rank that optimizes it, so
    that data-parallel ranks write equally much."""
    *replicated, replica = item.sharded.replica_id
    if any(replicated):  # over tensor-parallel ranks, or at the other end of the pipeline
        return
    if not item.is_optimized:
        if replica == 0:
            yield from pieces_of(item.sharded, item.tensor.detach())
    elif item.share is not None:
        start, stop, _ = item.share
        flat = item.tensor.detach().view(-1)[start:stop]
        yield from _pieces_of_range(item, start, stop, flat, "")
        yield from optimizer_pieces(item)


def optimizer_pieces(item: Item) -> Iterator[ShardedTensor]:
    """Of this rank's share. The master of a float32 parameter is the parameter itself."""
    if item.share is None:
        return
    start, stop, states = item.share
    for name, flat in states.items():
        if name != MASTER or item.tensor.dtype != torch.float32:
            yield from _pieces_of_range(item, start, stop, flat, name)


def _pieces_of_range(
    item: Item, start: int, stop: int, flat: torch.Tensor, state: str
) -> Iterator[ShardedTensor]:
    """`flat` is that range of the parameter, or of one of its states."""
    for whole in pieces_of(item.sharded, item.tensor.detach()):
        assert whole.data.is_contiguous(), f"{whole.key} is no range of its parameter"
        first = whole.data.storage_offset() - item.tensor.storage_offset()
        begin, end = max(start, first), min(stop, first + whole.data.numel())
        if begin >= end:
            continue
        for offset, shape, at in rectangles(whole.data.shape, begin - first, end - first):
            data = flat[first + at - start :][: math.prod(shape)].view(shape)
            yield _part(whole, offset, data, state)


def _part(
    whole: ShardedTensor, offset: tuple[int, ...], data: torch.Tensor, state: str
) -> ShardedTensor:
    prepended = whole.prepend_axis_num
    ahead, behind = whole.global_offset[:prepended], whole.global_offset[prepended:]
    return replace(
        whole,
        key=optimizer_key(state, whole.key) if state else whole.key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_offset=(*ahead, *(a + b for a, b in zip(behind, offset, strict=True))),
        axis_fragmentations=None,  # no regular grid
    )


Rectangle = tuple[tuple[int, ...], tuple[int, ...], int]
"""Offset and shape within a tensor, and where it starts in the flat tensor."""


def rectangles(
    shape: Sequence[int], start: int, stop: int, max_elements: int = CHUNK_BYTES // 4
) -> Iterator[Rectangle]:
    """The elements [start, stop) of a flat tensor as rectangles of the tensor, in order.

    Each is contiguous in memory, and of at most `max_elements` where a row has no more.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        for at in range(start, stop, max_elements):
            size = min(max_elements, stop - at)
            yield ((at,), (size,), at) if shape else ((), (), 0)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _within_row(shape, last, start, stop, max_elements)
        return
    yield from _within_row(shape, first - 1, start, first * row, max_elements)
    step = max(max_elements // row, 1)
    for at in range(first, last, step):
        size = min(step, last - at)
        yield (at, *(0 for _ in shape[1:])), (size, *shape[1:]), at * row
    yield from _within_row(shape, last, last * row, stop, max_elements)


def _within_row(
    shape: Sequence[int], number: int, start: int, stop: int, max_elements: int
) -> Iterator[Rectangle]:
    begin = number * math.prod(shape[1:])
    for offset, size, at in rectangles(shape[1:], start - begin, stop - begin, max_elements):
        yield (number, *offset), (1, *size), begin + at


def adam_step(student: Trainable) -> int:
    """Updates made. torch's Adam counts them for each parameter, apex's and TransformerEngine's for
    each group; Megatron-Core moves all alike."""
    for optimizer in distributed_optimizers(student):
        counters = [s["step"] for s in optimizer.optimizer.state.values() if "step" in s]
        counters += [group["step"] for group in optimizer.param_groups if "step" in group]
        if counters:
            return int(counters[0])
    return 0


def set_adam_step(student: Trainable, step: float) -> None:
    for optimizer in distributed_optimizers(student):
        for state in optimizer.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], step)
        for group in optimizer.param_groups:
            if "step" in group:
                group["step"] = int(step)


def rng_key(rank: int, world_size: int) -> str:
    return f"rng/shard_{rank}_{world_size}"


def rng_state() -> bytes:
    """Of this rank, in types that torch.load takes from anybody (weights_only)."""
    name, keys, *rest = np.random.get_state()
    return serialised(
        {
            "python": random.getstate(),
            "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "kind": _kind_of_device(),
            "device": torch.cuda.get_rng_state(),
            "megatron": get_cuda_rng_tracker().get_states(),
        }
    )


def restore_rng(content: bytes) -> None:
    state = torch.load(io.BytesIO(content), weights_only=True)
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["kind"] == _kind_of_device():  # another kind's generator has another state
        torch.cuda.set_rng_state(state["device"])
        get_cuda_rng_tracker().set_states(state["megatron"])


def _kind_of_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
