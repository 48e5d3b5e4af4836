"""A Megatron-Core model from a Hugging Face config.json. In: directory, layout. Out: CausalLM.

A CausalLM's forward stops at the last hidden states: the loss picks the rows that predict a
response token before it calls `lm_head`, so prompt and padding rows never meet the vocabulary.
"""
# Shapes: S tokens of this rank, H hidden size, N picked rows, V this rank's vocabulary columns.

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from transformers import AutoConfig, PretrainedConfig

from megatron_eopd.config import ModelConfig
from megatron_eopd.errors import ConfigError
from megatron_eopd.models import rope
from megatron_eopd.models.attention import SDPACoreAttention
from megatron_eopd.models.families import family_of
from megatron_eopd.models.families.base import refuse
from megatron_eopd.models.hf_weights import head_shape, num_experts, weights_of
from megatron_eopd.models.norm import RMSNorm
from megatron_eopd.models.patches import let_routers_run_without_transformer_engine
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.layout import Layout, pad_vocab_size


class CausalLM(GPTModel):
    """GPTModel whose last stage returns hidden states [S, 1, H] after the final norm.

    Only `_postprocess` is replaced: both Megatron-Core lines that are supported call it with
    keywords, as the last act of forward.
    """

    def _postprocess(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states

    def pick_rows(self, hidden_S1H: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        """Rows of the last hidden states, [N, H].

        Forward: one all-gather under sequence parallelism, else none. Backward: none; the gradient
        is split, because lm_head's own backward has already summed it over the group.
        """
        if self.config.sequence_parallel:
            hidden_S1H = gather_from_sequence_parallel_region(
                hidden_S1H, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_S1H.squeeze(1).index_select(0, rows_N)

    def lm_head(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Vocab-parallel logits [N, V]. Backward: one all-reduce of the hidden states' gradient."""
        # Unlike the layers before it, the head gets whole sequences: see pick_rows.
        self.output_layer.sequence_parallel = False
        logits_1NV, _ = self.output_layer(hidden_NH.unsqueeze(0), weight=self.lm_head_weight())
        return logits_1NV.squeeze(0)

    def lm_head_weight(self) -> torch.Tensor:
        """This rank's rows of the LM head, [V, H]; the embedding's where the two are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def read_hf_config(hf_path: Path) -> PretrainedConfig:
    """
    Raises:
        ConfigError: no such directory, no config.json, or a model family without a weight table.
    """
    if not (Path(hf_path) / "config.json").is_file():
        raise ConfigError(
            f"{hf_path}: no config.json there. Give the path of a Hugging Face model directory."
        )
    try:
        hf_config = AutoConfig.from_pretrained(hf_path)
        family = family_of(hf_config.model_type)
    except (ValueError, OSError) as error:  # OSError: config.json is no JSON
        raise ConfigError(f"{hf_path}: {error}") from None
    if family.architecture not in (hf_config.architectures or [family.architecture]):
        raise ConfigError(
            f"{hf_path}: config.json lists architectures={hf_config.architectures}, but "
            f"model_type={hf_config.model_type!r} is supported as {family.architecture} only."
        )
    return hf_config


def build_model(hf_path: Path, model: ModelConfig, context: ParallelContext) -> list[CausalLM]:
    """This rank's part of the model, its weights not yet loaded: one chunk, or as many as the
    interleaved pipeline schedule runs on each stage."""
    hf_config = read_hf_config(hf_path)
    config = transformer_config(hf_config, model, context.layout)
    frequencies = rope.inverse_frequencies(hf_config).to(context.device)
    chunks = []
    for chunk in range(context.layout.vpp):
        language_model = _construct(hf_config, config, model, context, chunk).to(context.device)
        language_model.rotary_pos_emb.inv_freq = frequencies
        chunks.append(language_model)
    return chunks


def build_skeleton(hf_config: PretrainedConfig, context: ParallelContext) -> CausalLM:
    """The model with meta tensors for parameters: names and shapes of weights, and no memory.

    Its vocabulary is not padded. Needs a context without a GPU.
    """
    assert context.device.type == "cpu", "on a GPU Megatron-Core names the device of its weights"
    model = ModelConfig(make_vocab_size_divisible_by=1)
    config = transformer_config(hf_config, model, context.layout)
    with torch.device("meta"):
        return _construct(hf_config, config, model, context, chunk=0)


def _construct(
    hf_config: PretrainedConfig,
    config: TransformerConfig,
    model: ModelConfig,
    context: ParallelContext,
    chunk: int,
) -> CausalLM:
    layout = context.layout
    let_routers_run_without_transformer_engine()
    # Megatron takes no chunk number where there is but one.
    vp_stage = chunk if layout.vpp > 1 else None
    language_model = CausalLM(
        config=config,
        transformer_layer_spec=layer_specs(config, model, layout.pp_rank, vp_stage),
        vocab_size=pad_vocab_size(
            hf_config.vocab_size, model.make_vocab_size_divisible_by, layout.tp
        ),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=layout.is_first_stage and chunk == 0,
        post_process=layout.is_last_stage and chunk == layout.vpp - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=hf_config.rope_parameters["rope_theta"],
        pg_collection=context.groups,
        vp_stage=vp_stage,
    )
    _mark_shards(language_model, hf_config)
    return language_model


def _mark_shards(model: CausalLM, hf_config: PretrainedConfig) -> None:
    """Say which parameters are cut over the tensor-parallel ranks, and along which dim; and whose
    gradients are summed over other ranks than those of the dense layers.

    Megatron does the first while it initialises weights, which is skipped here. Unmarked shards
    would count as copies of rank 0's, and the gradient norm would leave out all other ranks. The
    second it does with expert parallelism only: experts that are whole on each tensor-parallel
    rank see that rank's tokens alone, and their gradients would never meet. Here it holds always,
    so that every layout has the same two optimizers in a checkpoint.
    """
    weights = weights_of(model, hf_config)
    for name, parameter in model.named_parameters():
        dim = weights[name].row.split.dim
        if dim is not None and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        if weights[name].row.is_expert:
            parameter.allreduce = False


def transformer_config(
    hf_config: PretrainedConfig, model: ModelConfig, layout: Layout
) -> TransformerConfig:
    refuse(hf_config, use_sliding_window=True)
    if hf_config.hidden_act != "silu":
        raise ConfigError(
            f"config.json: hidden_act={hf_config.hidden_act!r}, only 'silu' is known."
        )
    dtype = getattr(torch, model.dtype)
    head_dim = head_shape(hf_config).head_dim
    has_experts = num_experts(hf_config) > 0
    recomputes_layers = model.recompute_granularity == "full"
    options = {
        "add_bias_linear": False,
        # Asked for by variable lengths, also without experts.
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": uses_transformer_engine(model),
        **family_of(hf_config.model_type).megatron_options(hf_config),
    }
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim,
        softmax_scale=rope.attention_scaling(hf_config) ** 2 / math.sqrt(head_dim),
        ffn_hidden_size=hf_config.intermediate_size,
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        # A dense teacher may have the layout of a student with experts.
        expert_model_parallel_size=layout.ep if has_experts else 1,
        expert_tensor_parallel_size=layout.expert_tp if has_experts else 1,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bfloat16",
        # Microbatches are packed, each to its own length, so stages cannot assume one; except with
        # interleaved chunks (see data/packing.common_row_length).
        variable_seq_lengths=layout.vpp == 1,
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
        gradient_accumulation_fusion=_has_apex_kernel(),
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
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


def _has_apex_kernel() -> bool:
    """Apex's kernel that adds a weight's gradient to the float32 buffer while it multiplies.

    TransformerEngine's layers could do so without it. But the switch is one for the whole model,
    and the LM head is Megatron's own layer, whose constructor raises where Apex is missing.
    """
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


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
