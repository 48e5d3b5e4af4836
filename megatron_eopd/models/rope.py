"""Rotary frequencies as transformers computes them. In: HF config. Out: what Megatron is given.

Megatron's own rope scaling knows Llama 3's with three of its four constants fixed. Its embedding
multiplies positions by `inv_freq`, whatever that holds, so the values of transformers go there.
"""
# Shapes: D head dim.

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_eopd.errors import ConfigError
from megatron_eopd.models.hf_weights import head_shape

SUPPORTED = ("default", "linear", "llama3", "yarn")
"""Types whose frequencies do not depend on the length of the sequence."""


def inverse_frequencies(hf_config: PretrainedConfig) -> torch.Tensor:
    """float32 [D/2]."""
    return _rope(hf_config)[0]


def attention_scaling(hf_config: PretrainedConfig) -> float:
    """Factor on queries and on keys alike (YaRN's), so its square belongs on the scores."""
    return _rope(hf_config)[1]


def _rope(hf_config: PretrainedConfig) -> tuple[torch.Tensor, float]:
    parameters = hf_config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in SUPPORTED or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"config.json: rope_parameters={parameters} are not supported, only whole heads with "
            f"rope_type one of {', '.join(SUPPORTED)}."
        )
    if rope_type != "default":
        return ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    head_dim = head_shape(hf_config).head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0
