"""Qwen3 dense: grouped-query attention with norms on queries and keys, SwiGLU, no biases."""

from megatron_eopd.models.families.base import Family, Mapping, Split

_M = "decoder.layers.{i}."
_H = "model.layers.{i}."

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    qk_layernorm=True,
    mappings=(
        Mapping(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Split.VOCAB),
        Mapping(
            (
                f"{_M}input_layernorm.weight",
                f"{_M}self_attention.linear_qkv.layer_norm_weight",
            ),
            (f"{_H}input_layernorm.weight",),
            Split.REPLICATED,
        ),
        Mapping(
            (f"{_M}self_attention.linear_qkv.weight",),
            tuple(f"{_H}self_attn.{name}_proj.weight" for name in "qkv"),
            Split.QKV,
        ),
        Mapping(
            (f"{_M}self_attention.q_layernorm.weight",),
            (f"{_H}self_attn.q_norm.weight",),
            Split.REPLICATED,
        ),
        Mapping(
            (f"{_M}self_attention.k_layernorm.weight",),
            (f"{_H}self_attn.k_norm.weight",),
            Split.REPLICATED,
        ),
        Mapping(
            (f"{_M}self_attention.linear_proj.weight",),
            (f"{_H}self_attn.o_proj.weight",),
            Split.ROW,
        ),
        Mapping(
            (f"{_M}pre_mlp_layernorm.weight", f"{_M}mlp.linear_fc1.layer_norm_weight"),
            (f"{_H}post_attention_layernorm.weight",),
            Split.REPLICATED,
        ),
        Mapping(
            (f"{_M}mlp.linear_fc1.weight",),
            (f"{_H}mlp.gate_proj.weight", f"{_H}mlp.up_proj.weight"),
            Split.GATE_UP,
        ),
        Mapping((f"{_M}mlp.linear_fc2.weight",), (f"{_H}mlp.down_proj.weight",), Split.ROW),
        Mapping(("decoder.final_layernorm.weight",), ("model.norm.weight",), Split.REPLICATED),
        Mapping(("output_layer.weight",), ("lm_head.weight",), Split.VOCAB),
    ),
)
