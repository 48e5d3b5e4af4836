"""Qwen3-MoE: Qwen3's attention, and in all or some layers a routed mixture of experts.

The router is a softmax over all experts of which the top k stay. Megatron's softmax over the top
k alone is the same thing renormalised, so `norm_topk_prob` chooses between the two.
"""

from typing import Any

from transformers import PretrainedConfig

from megatron_eopd.models.config_keys import QWEN3_MOE
from megatron_eopd.models.families.base import (
    ATTENTION,
    EMBEDDINGS,
    EXPERTS,
    MLP,
    QK_NORMS,
    Family,
)


def megatron_options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        "num_moe_experts": hf_config.num_experts,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_layer_freq": moe_layer_freq(hf_config),
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        # Float32: two experts whose bfloat16 scores tie would be drawn differently by each engine.
        "moe_router_dtype": "fp32",
        # The distillation loss is the only loss: no balancing term beside it.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def moe_layer_freq(hf_config: PretrainedConfig) -> int | list[int]:
    """Megatron's pattern of layers, 1 for experts and 0 for a dense MLP; plain 1 for experts
    everywhere, because a list gives every layer checkpoint keys of its own."""
    step, dense = hf_config.decoder_sparse_step, set(hf_config.mlp_only_layers)
    layers = range(hf_config.num_hidden_layers)
    pattern = [int(i not in dense and (i + 1) % step == 0) for i in layers]
    return 1 if all(pattern) else pattern


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    keys=QWEN3_MOE,
    mappings=(*EMBEDDINGS, *ATTENTION, *QK_NORMS, *MLP, *EXPERTS),
    megatron_options=megatron_options,
)
