"""A Hugging Face config.json and our options into Megatron-Core's TransformerConfig."""

import importlib.util
import math

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megatron_eopd.config import ModelConfig
from megatron_eopd.errors import ConfigError
from megatron_eopd.models import rope
from megatron_eopd.models.families import family_of
from megatron_eopd.models.hf_weights import head_shape, num_experts
from megatron_eopd.parallel.layout import Layout


def transformer_config(
    hf_config: PretrainedConfig, model: ModelConfig, layout: Layout
) -> TransformerConfig:
    dtype = getattr(torch, model.dtype)
    head_dim = head_shape(hf_config).head_dim
    has_experts = num_experts(hf_config) > 0
    recomputes_layers = model.recompute_granularity == "full"
    options = {
        "add_bias_linear": False,
        # Variable sequence lengths are refused with Megatron's default, also without experts.
        "moe_token_dispatcher_type": "alltoall",
        # One product for all experts of a rank: only TransformerEngine's layers have it.
        "moe_grouped_gemm": uses_transformer_engine(model),
        **family_of(hf_config.model_type).megatron_options(hf_config),
    }
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim,
        # YaRN scales attention by a factor that Megatron's rotary embedding does not apply.
        softmax_scale=rope.attention_scaling(hf_config) ** 2 / math.sqrt(head_dim),
        ffn_hidden_size=hf_config.intermediate_size,
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        # Megatron's default is 0.1. Distillation compares two distributions, without noise.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        # Of two stages the last one's number says all. Given both, Megatron's numbering of
        # interleaved chunks divides by the stages between them.
        num_layers_in_first_pipeline_stage=(
            None if layout.pp == 2 and layout.last_stage_layers else layout.first_stage_layers
        ),
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        context_parallel_size=layout.cp,
        # A dense teacher may have the layout of a student with experts.
        expert_model_parallel_size=layout.ep if has_experts else 1,
        expert_tensor_parallel_size=layout.expert_tp if has_experts else 1,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        deterministic_mode=model.deterministic_mode,
        # Of the activations between stages; Megatron cannot tell it from the parameters' type.
        pipeline_dtype=dtype,
        bf16=model.dtype == "bfloat16",
        # Microbatches are packed, each to its own length, so stages cannot assume one; except with
        # interleaved chunks (see data/packing.common_row_length).
        variable_seq_lengths=layout.vpp == 1,
        # Interleaved chunks send while they compute, and singly: with two stages a batched call
        # took the message to the next stage for one to the stage before, which is the same rank.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        # The loss is a sum and Megatron divides by the tokens of all ranks and microbatches.
        calculate_per_token_loss=True,
        recompute_granularity=model.recompute_granularity,
        recompute_method=model.recompute_method if recomputes_layers else None,
        recompute_num_layers=model.recompute_num_layers if recomputes_layers else None,
        # Weights come from a checkpoint; on CPU Megatron has no other initialisation.
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        gradient_accumulation_fusion=has_apex_kernel(),
        # TransformerEngine's kernel, which finds the sequences of a row on the device, with context
        # parallelism, too. Megatron's other way asks for their lengths in every layer.
        apply_rope_fusion=uses_transformer_engine(model),
        # Of Megatron's own attention, which neither specification uses here: the local one has SDPA
        # or flash attention, the other TransformerEngine's kernel.
        masked_softmax_fusion=False,
        # A SwiGLU as one function, which keeps its input alone, not silu of the gate and both
        # factors beside it. The same formula: on a GPU it is compiled, and rounds once where
        # PyTorch rounds twice; on a CPU it runs as written, forward to the same bits.
        bias_activation_fusion=True,
        # Without biases and dropout one addition is left, and nothing to fuse it with.
        bias_dropout_fusion=False,
        # Rows move to their experts by TransformerEngine's kernel, where Megatron's other way asks
        # the device how many there are. No arithmetic but the sum of a token's experts.
        moe_permute_fusion=has_experts and uses_transformer_engine(model),
        # What a stage has sent is not read again here: its backward pass needs the graph alone. The
        # interleaved schedule goes on before it is sent, and gloo would send what lies there then.
        deallocate_pipeline_outputs=layout.vpp == 1,
        # Of Apex's LayerNorm; these models have RMSNorm.
        persist_layer_norm=False,
        **options,
    )


def uses_transformer_engine(model: ModelConfig) -> bool:
    available = importlib.util.find_spec("transformer_engine") is not None
    if model.transformer_impl == "transformer_engine" and not available:
        raise ConfigError(
            "model.transformer_impl=transformer_engine, but transformer_engine cannot be imported. "
            "Install transformer-engine[pytorch], or set model.transformer_impl=local."
        )
    if model.transformer_impl == "auto":
        return available and torch.cuda.is_available()
    return model.transformer_impl == "transformer_engine"


def has_apex_kernel() -> bool:
    """Apex's kernel that adds a weight's gradient to the float32 buffer while it multiplies.

    TransformerEngine's layers could do so without it. But the switch is one for the whole model,
    and the LM head is Megatron's own layer, whose constructor raises where Apex is missing.
    """
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
