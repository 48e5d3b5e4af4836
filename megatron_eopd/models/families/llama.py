"""Llama 3 (and 2): grouped-query attention, SwiGLU, no biases unless config.json has them all.

Megatron has one switch for the biases of attention output and MLP, so the two go together.
"""

from typing import Any

from transformers import PretrainedConfig

from megatron_eopd.models.config_keys import LLAMA
from megatron_eopd.models.families.base import (
    ATTENTION,
    EMBEDDINGS,
    MLP,
    QKV_BIAS,
    Family,
    H,
    M,
    Mapping,
    Split,
)

BIASES = (
    QKV_BIAS,
    Mapping(
        (f"{M}self_attention.linear_proj.bias",),
        (f"{H}self_attn.o_proj.bias",),
        Split.REPLICATED,
    ),
    Mapping(
        (f"{M}mlp.linear_fc1.bias",),
        (f"{H}mlp.gate_proj.bias", f"{H}mlp.up_proj.bias"),
        Split.GATE_UP,
    ),
    Mapping((f"{M}mlp.linear_fc2.bias",), (f"{H}mlp.down_proj.bias",), Split.REPLICATED),
)


def megatron_options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {"add_bias_linear": hf_config.mlp_bias}


FAMILY = Family(
    architecture="LlamaForCausalLM",
    keys=LLAMA,
    mappings=(*EMBEDDINGS, *ATTENTION, *MLP, *BIASES),
    megatron_options=megatron_options,
)
