"""The two sweeps as PyTorch operators, `megatron_eopd::shard_sums` and two `shard_gradient`s.

An operator has a name, a schema and an answer to "what shape would come out": a tensor without
memory can go through it (see rehearsal/), and torch.compile does not look into it. Which kernels
run is chosen inside, by the tensors that come.
"""
# Shapes: N tokens, V this rank's columns, K top-k. Names as in kernels/__init__.

from typing import Any

import torch
from torch import Tensor

from megatron_eopd.losses import kernels
from megatron_eopd.losses.kernels import ShardSums


def shard_sums(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None,
    num_columns: int,
    temperatures: tuple[float, float],
    top_k: int,
) -> ShardSums:
    """Of this rank's columns; see kernels/."""
    return ShardSums(
        *_shard_sums(student_NV, teacher_NV, mask_N, num_columns, *temperatures, top_k)
    )


def shard_gradient(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None,
    num_columns: int,
    temperatures: tuple[float, float],
    weights_N7: Tensor,
    inplace: bool,
) -> Tensor:
    """Of the student's logits; see kernels/. Autograd notices that `inplace` has overwritten them:
    another reader fails loudly."""
    rest = (teacher_NV, mask_N, num_columns, *temperatures, weights_N7)
    # Odd strides are not worth a kernel: then the gradient gets memory of its own after all.
    if inplace and student_NV.stride(-1) == 1:
        _shard_gradient_inplace(student_NV, *rest)
        return student_NV
    return _shard_gradient(student_NV, *rest)


@torch.library.custom_op("megatron_eopd::shard_sums", mutates_args=())
def _shard_sums(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None,
    num_columns: int,
    student_temperature: float,
    teacher_temperature: float,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    temperatures = (student_temperature, teacher_temperature)
    sweep = kernels.kernels_for(student_NV, teacher_NV).shard_sums
    return tuple(sweep(student_NV, teacher_NV, mask_N, num_columns, temperatures, top_k))


@_shard_sums.register_fake
def _(student_NV: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = len(student_NV), rest[-1]
    values_NK = student_NV.new_empty(num_tokens, top_k, dtype=torch.float32)
    sums_N8 = student_NV.new_empty(num_tokens, 8, dtype=torch.float32)
    return sums_N8, values_NK, values_NK.to(torch.int64)


@torch.library.custom_op("megatron_eopd::shard_gradient", mutates_args=())
def _shard_gradient(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None,
    num_columns: int,
    student_temperature: float,
    teacher_temperature: float,
    weights_N7: Tensor,
) -> Tensor:
    temperatures = (student_temperature, teacher_temperature)
    sweep = kernels.kernels_for(student_NV, teacher_NV).shard_gradient
    return sweep(student_NV, teacher_NV, mask_N, num_columns, temperatures, weights_N7, False)


@_shard_gradient.register_fake
def _(student_NV: Tensor, *_: Any) -> Tensor:
    return student_NV.new_empty(student_NV.shape)


@torch.library.custom_op("megatron_eopd::shard_gradient_", mutates_args=("student_NV",))
def _shard_gradient_inplace(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None,
    num_columns: int,
    student_temperature: float,
    teacher_temperature: float,
    weights_N7: Tensor,
) -> None:
    temperatures = (student_temperature, teacher_temperature)
    sweep = kernels.kernels_for(student_NV, teacher_NV).shard_gradient
    written_NV = sweep(student_NV, teacher_NV, mask_N, num_columns, temperatures, weights_N7, True)
    assert written_NV is student_NV


@_shard_gradient_inplace.register_fake
def _(*_: Any) -> None: ...
