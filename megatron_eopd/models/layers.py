"""What a model chunk is built of: Megatron's layers with TransformerEngine, or its plain ones.

In: a TransformerConfig. Out: Megatron's layer specifications, a layer of experts or a dense one at
each place, as the model has them.
"""

from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_eopd.config import ModelConfig
from megatron_eopd.models.attention import SDPACoreAttention
from megatron_eopd.models.megatron_config import uses_transformer_engine
from megatron_eopd.models.norm import RMSNorm


def layer_specs(
    config: TransformerConfig, model: ModelConfig, pp_rank: int, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """What this model chunk is built of: layers with experts and without, and the norm."""
    freq = config.moe_layer_freq
    pattern = freq if isinstance(freq, list) else [int(bool(config.num_moe_experts))]
    with_engine = uses_transformer_engine(model)
    make_layer = _transformer_engine_layer if with_engine else _local_layer
    kinds = {kind: make_layer(config, config.num_moe_experts if kind else None) for kind in pattern}
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    layers = [kinds[pattern[i % len(pattern)]] for i in range(first, first + count)]
    return TransformerBlockSubmodules(
        layer_specs=layers, layer_norm=TENorm if with_engine else RMSNorm
    )


def _transformer_engine_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )


def _local_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if num_experts:
        # Checkpoint keys are TransformerEngine's, which fuses this norm into no layer of experts.
        parts.sharded_state_dict_keys_map = {
            name: key
            for name, key in parts.sharded_state_dict_keys_map.items()
            if name != "pre_mlp_layernorm."
        }
    return layer
