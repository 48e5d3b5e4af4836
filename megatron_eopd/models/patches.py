"""Faults of Megatron-Core that are mended from outside, each with the condition that ends it."""

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from megatron.core.transformer.moe import moe_utils


def let_routers_run_without_transformer_engine() -> None:
    """Megatron-Core 0.16 asks `te_general_gemm is not None` in RouterGatingLinearFunction, and
    defines that name only where TransformerEngine is installed: a NameError elsewhere. 0.19 sets
    it to None there, as this does.

    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/transformer/moe/moe_utils.py
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def keep_gradient_norm_on_the_device() -> None:
    """Without TransformerEngine and Apex, Megatron-Core up to 0.19 makes one tensor of all norms by
    way of Python numbers: the host waits for the device at every parameter. This stacks them.

    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/utils.py, which has
    local_multi_tensor_l2_norm
    """
    if getattr(clip_grads, "l2_norm_impl", None) is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(
    _chunk_size: int,
    _overflow: torch.Tensor,
    tensor_lists: list[list[torch.Tensor]],
    _per_tensor: bool,
) -> tuple[torch.Tensor, None]:
    """([1], None): of all elements, to the bit as Megatron's."""
    norms = torch.stack([torch.norm(tensor) for tensor in tensor_lists[0]])
    return torch.norm(norms).reshape(1), None
