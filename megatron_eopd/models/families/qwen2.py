"""Qwen2 and Qwen2.5: grouped-query attention with biases on queries, keys and values, SwiGLU."""

from typing import Any

from transformers import PretrainedConfig

from megatron_eopd.models.config_keys import QWEN2
from megatron_eopd.models.families.base import ATTENTION, EMBEDDINGS, MLP, QKV_BIAS, Family


def megatron_options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {"add_qkv_bias": True}


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    keys=QWEN2,
    mappings=(*EMBEDDINGS, *ATTENTION, QKV_BIAS, *MLP),
    megatron_options=megatron_options,
)
