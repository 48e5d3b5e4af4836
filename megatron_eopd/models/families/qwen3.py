"""Qwen3 dense: grouped-query attention with norms on queries and keys, SwiGLU, no biases."""

from typing import Any

from transformers import PretrainedConfig

from megatron_eopd.models.config_keys import QWEN3
from megatron_eopd.models.families.base import (
    ATTENTION,
    EMBEDDINGS,
    MLP,
    QK_NORMS,
    Family,
)


def megatron_options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {"qk_layernorm": True}


FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    keys=QWEN3,
    mappings=(*EMBEDDINGS, *ATTENTION, *QK_NORMS, *MLP),
    megatron_options=megatron_options,
)
