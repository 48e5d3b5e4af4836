"""Qwen3 dense: grouped-query attention with norms on queries and keys, SwiGLU, no biases."""

from typing import Any

from transformers import PretrainedConfig

from megatron_eopd.models.families.base import (
    ATTENTION,
    EMBEDDINGS,
    MLP,
    QK_NORMS,
    Family,
    refuse,
)


def megatron_options(hf_config: PretrainedConfig) -> dict[str, Any]:
    refuse(hf_config, attention_bias=True)
    return {"qk_layernorm": True}


FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    mappings=(*EMBEDDINGS, *ATTENTION, *QK_NORMS, *MLP),
    megatron_options=megatron_options,
)
