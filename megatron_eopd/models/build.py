"""A Megatron-Core model from a Hugging Face config.json. In: directory, layout. Out: CausalLM."""

from pathlib import Path

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megatron_eopd.config import ModelConfig
from megatron_eopd.models import rope
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_weights import weights_of
from megatron_eopd.models.layers import layer_specs
from megatron_eopd.models.megatron_config import transformer_config, uses_transformer_engine
from megatron_eopd.models.patches import let_routers_run_without_transformer_engine
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.layout import pad_vocab_size


def build_model(hf_path: Path, model: ModelConfig, context: ParallelContext) -> list[CausalLM]:
    """This rank's part of the model, its weights not yet loaded: one chunk, or as many as the
    interleaved pipeline schedule runs on each stage."""
    hf_config = read_hf_config(hf_path)
    config = transformer_config(hf_config, model, context.layout)
    frequencies = rope.inverse_frequencies(hf_config).to(context.device)
    chunks = []
    for chunk in range(context.layout.vpp):
        with context.device:
            language_model = _construct(hf_config, config, model, context, chunk)
        if uses_transformer_engine(model):
            language_model.rotary_pos_emb.inv_freq = frequencies
        else:
            language_model.frequencies_F = frequencies
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
        # Without TransformerEngine's kernel our own attention turns queries and keys.
        position_embedding_type="rope" if uses_transformer_engine(model) else "none",
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
