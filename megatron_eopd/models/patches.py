"""Faults of Megatron-Core that are mended from outside, each with the condition that ends it."""

from megatron.core.transformer.moe import moe_utils


def let_routers_run_without_transformer_engine() -> None:
    """Megatron-Core 0.16 asks `te_general_gemm is not None` in RouterGatingLinearFunction, and
    defines that name only where TransformerEngine is installed: a NameError elsewhere. 0.19 sets
    it to None there, as this does.

    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/transformer/moe/moe_utils.py
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
