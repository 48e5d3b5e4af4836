"""Tiny random models of every family, in float32, as Hugging Face directories.

Weights are large enough that a wrong one shows in the logits; norms and biases, which transformers
starts at 1 and 0, are random too. The vocabulary is prime, so that no tensor-parallel size divides
it, and head_dim · heads is not the hidden size.
"""

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SHAPE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "initializer_range": 0.1,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that all three of its bands of frequencies are met.
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
}

FAMILIES: dict[str, tuple[type, type, dict]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3_tied": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3_yarn": (Qwen3Config, Qwen3ForCausalLM, {"rope_parameters": YARN_ROPE}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS),
    "qwen3_moe_mixed": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        # Layers 0 to 3: dense, experts, dense, dense; probabilities not renormalised.
        EXPERTS | {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama_tied_with_biases": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
}


def make_model(family: str, path: Path, *, seed: int = 0, **overrides) -> Path:
    """Write a model of FAMILIES; overrides are fields of its config.json."""
    config_class, model_class, options = FAMILIES[family]
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config_class(**(SHAPE | options | overrides))).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(path)
    return path
