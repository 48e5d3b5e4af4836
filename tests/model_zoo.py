"""Config.json files in the forms that published models have, and what a run makes of each.

Keys, spellings and odd values are those of the published files; the sizes are tiny. `RUNS`, or the
key that is refused: tests/test_model_files.py holds planner, dry run and run to it, and
docs/checkpoints.md to the same table. Names with a remark are of forms, not of models.
"""

from typing import Any

RUNS = "runs"

SIZES: dict[str, Any] = {
    "vocab_size": 112,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
LLAMA = SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.31.0",
}
LLAMA_3 = LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "transformers_version": "4.42.3",
}
LLAMA_3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
SMOL_LM = LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.041666666666666664,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
QWEN_2 = SIZES | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "transformers_version": "4.43.1",
    "use_sliding_window": False,
}
QWEN_3 = SIZES | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 32,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
}
QWEN_3_MOE = QWEN_3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
GPTQ = {"bits": 4, "damp_percent": 0.01, "desc_act": False, "group_size": 128} | {
    "quant_method": "gptq",
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
}
BITS_AND_BYTES = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
COMPRESSED = {"format": "float-quantized", "quant_method": "compressed-tensors"}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def as_transformers_5(config: dict[str, Any], **rope: Any) -> dict[str, Any]:
    """The spelling that transformers 5 writes."""
    kept = without(config, "torch_dtype", "rope_theta", "rope_scaling", "transformers_version")
    parameters = {"rope_type": "default", "rope_theta": config["rope_theta"]} | rope
    return kept | {
        "dtype": "bfloat16",
        "rope_parameters": parameters,
        "transformers_version": "5.0.0",
    }


ZOO: dict[str, tuple[dict[str, Any], str]] = {
    # Llama
    "LLaMA-1": (
        without(LLAMA, "num_key_value_heads", "rope_scaling", "pretraining_tp")
        | {"max_sequence_length": 4096, "pad_token_id": 0, "rms_norm_eps": 1e-06},
        RUNS,
    ),
    "Llama-2": (LLAMA, RUNS),
    "Llama-2-70B": (LLAMA | {"num_key_value_heads": 1, "use_cache": False}, RUNS),
    "Llama-3": (LLAMA_3 | {"max_position_embeddings": 8192, "eos_token_id": 128001}, RUNS),
    "Llama-3.1": (LLAMA_3 | {"rope_scaling": LLAMA_3_ROPE}, RUNS),
    "Llama-3.1, by transformers 5": (as_transformers_5(LLAMA_3, **LLAMA_3_ROPE), RUNS),
    "Llama-3.1-FP8": (
        LLAMA_3 | {"rope_scaling": LLAMA_3_ROPE, "quantization_config": COMPRESSED},
        "quantization_config",
    ),
    "Llama-3.1-bnb-4bit": (
        LLAMA_3 | {"rope_scaling": LLAMA_3_ROPE, "quantization_config": BITS_AND_BYTES},
        "quantization_config",
    ),
    "Llama-3.2": (
        LLAMA_3
        | {"head_dim": 32, "tie_word_embeddings": True}
        | {"rope_scaling": LLAMA_3_ROPE | {"factor": 32.0}},
        RUNS,
    ),
    "Llama-3.3": (LLAMA_3 | {"head_dim": 16, "rope_scaling": LLAMA_3_ROPE}, RUNS),
    "R1-Distill-Llama": (
        LLAMA_3 | {"eos_token_id": 128001, "rope_scaling": LLAMA_3_ROPE},
        RUNS,
    ),
    "SmolLM": (SMOL_LM | {"rope_theta": 10000.0}, RUNS),
    "SmolLM2": (
        SMOL_LM
        | {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000}
        | {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
        RUNS,
    ),
    "TinyLlama": (LLAMA | {"attention_bias": False, "max_position_embeddings": 2048}, RUNS),
    "Yi": (LLAMA | {"pad_token_id": 0, "rope_theta": 5000000.0}, RUNS),
    "deepseek-llm": (LLAMA | {"bos_token_id": 100000, "num_key_value_heads": 4}, RUNS),
    "deepseek-coder": (
        LLAMA | {"rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        RUNS,
    ),
    "Yarn-Llama-2": (
        LLAMA
        | {"auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"}}
        | {"rope_scaling": YARN | {"finetuned": True}},
        "auto_map",
    ),
    "Llama with biases": (LLAMA | {"attention_bias": True, "mlp_bias": True}, RUNS),
    "Smaug: biases on attention alone": (LLAMA | {"attention_bias": True}, "attention_bias"),
    "Smaug: `bias`": (LLAMA | {"bias": True}, "bias"),
    "Llama with windows": (LLAMA | {"sliding_window": 16}, "sliding_window"),
    "Llama of windows by layer": (
        LLAMA | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},
        "layer_types",
    ),
    "Llama, both directions": (LLAMA | {"is_causal": False}, "is_causal"),
    "Llama, dynamic rope": (
        LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling",
    ),
    "Llama, longrope": (
        LLAMA
        | {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 2048,
            }
        },
        "rope_scaling",
    ),
    "Llama, part of each head turned": (
        LLAMA | {"partial_rotary_factor": 0.5},
        "partial_rotary_factor",
    ),
    "Llama, gelu": (LLAMA | {"hidden_act": "gelu"}, "hidden_act"),
    "Llama, scaled logits": (LLAMA | {"logit_scale": 0.25}, "logit_scale"),
    "Llama, a classifier": (
        LLAMA | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1},
        "architectures",
    ),
    # Qwen2 and Qwen2.5
    "Qwen2": (QWEN_2, RUNS),
    "Qwen2-Instruct": (QWEN_2 | {"sliding_window": 32768, "max_window_layers": 21}, RUNS),
    "Qwen2.5-0.5B": (
        QWEN_2 | {"sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False},
        RUNS,
    ),
    "Qwen2.5-Instruct": (QWEN_2 | {"max_window_layers": 70}, RUNS),
    "Qwen2.5-Instruct with YaRN": (QWEN_2 | {"rope_scaling": YARN}, RUNS),
    "Qwen2.5-Math": (
        QWEN_2 | {"max_position_embeddings": 4096, "rope_theta": 10000, "sliding_window": 4096},
        RUNS,
    ),
    "Qwen2.5-Coder": (QWEN_2 | {"bos_token_id": 151643, "sliding_window": 131072}, RUNS),
    "Qwen2.5-1M": (
        QWEN_2
        | {"max_position_embeddings": 1010000, "rope_theta": 10000000.0}
        | {
            "dual_chunk_attention_config": {
                "chunk_size": 262144,
                "local_size": 8192,
                "original_max_position_embeddings": 262144,
            }
        },
        "dual_chunk_attention_config",
    ),
    "QwQ": (QWEN_2 | {"max_window_layers": 64, "sliding_window": 32768}, RUNS),
    "R1-Distill-Qwen": (
        QWEN_2 | {"max_position_embeddings": 131072, "rope_theta": 10000, "use_mrope": False},
        RUNS,
    ),
    "Qwen2.5, by transformers 5": (
        as_transformers_5(QWEN_2) | {"layer_types": ["full_attention"] * 2, "sliding_window": None},
        RUNS,
    ),
    "Qwen2.5, rope by layer type": (
        without(QWEN_2, "rope_theta")
        | {"layer_types": ["full_attention"] * 2}
        | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        RUNS,
    ),
    "Qwen2 with windows": (
        QWEN_2 | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        "use_sliding_window",
    ),
    "Qwen2.5-AWQ": (QWEN_2 | {"quantization_config": AWQ}, "quantization_config"),
    "Qwen2.5-GPTQ": (QWEN_2 | {"quantization_config": GPTQ}, "quantization_config"),
    "Qwen2.5, MLX": (QWEN_2 | {"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
    "Qwen2.5-Math-PRM": (
        QWEN_2 | {"architectures": ["Qwen2ForProcessRewardModel"]},
        "architectures",
    ),
    # Qwen3
    "Qwen3-0.6B": (QWEN_3 | {"max_window_layers": 28, "tie_word_embeddings": True}, RUNS),
    "Qwen3-8B-Base": (QWEN_3 | {"max_position_embeddings": 32768, "eos_token_id": 151643}, RUNS),
    "Qwen3-32B": (QWEN_3 | {"max_window_layers": 64}, RUNS),
    "Qwen3-4B-Instruct-2507": (
        QWEN_3
        | {"max_position_embeddings": 262144, "rope_theta": 5000000, "tie_word_embeddings": True},
        RUNS,
    ),
    "Qwen3 with YaRN": (
        QWEN_3
        | {"max_position_embeddings": 131072}
        | {"rope_scaling": without(YARN, "type") | {"rope_type": "yarn"}},
        RUNS,
    ),
    "Qwen3, by transformers 5": (
        as_transformers_5(QWEN_3) | {"layer_types": ["full_attention"] * 2},
        RUNS,
    ),
    "Qwen3, theta above a scaling by transformers 5": (
        without(QWEN_3, "rope_scaling")
        | {"rope_parameters": without(YARN, "type") | {"rope_type": "yarn"}},
        RUNS,
    ),
    "Qwen3, two thetas": (
        without(QWEN_3, "rope_scaling")
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "rope_theta",
    ),
    "Qwen3-8B-AWQ": (QWEN_3 | {"quantization_config": AWQ}, "quantization_config"),
    "Qwen3-8B-FP8": (QWEN_3 | {"quantization_config": FP8}, "quantization_config"),
    "Qwen3 with biases": (QWEN_3 | {"attention_bias": True}, "attention_bias"),
    "Qwen3-Embedding, both directions": (QWEN_3 | {"is_causal": False}, "is_causal"),
    # Qwen3-MoE
    "Qwen3-30B-A3B": (QWEN_3_MOE | {"max_window_layers": 48}, RUNS),
    "Qwen3-235B-A22B": (QWEN_3_MOE | {"max_window_layers": 94, "num_key_value_heads": 1}, RUNS),
    "Qwen3-30B-A3B-Instruct-2507": (
        QWEN_3_MOE | {"max_position_embeddings": 262144, "rope_theta": 10000000},
        RUNS,
    ),
    "Qwen3-30B-A3B, 1M": (
        QWEN_3_MOE
        | {"max_position_embeddings": 1010000}
        | {
            "dual_chunk_attention_config": {
                "chunk_size": 262144,
                "local_size": 8192,
                "original_max_position_embeddings": 262144,
                "sparse_attention_enabled": True,
            }
        },
        "dual_chunk_attention_config",
    ),
    "Qwen3-Coder-30B-A3B": (
        QWEN_3_MOE
        | {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}
        | {"router_aux_loss_coef": 0.0, "rope_theta": 10000000},
        RUNS,
    ),
    "Qwen3-30B-A3B, by transformers 5": (
        without(as_transformers_5(QWEN_3_MOE), "num_experts") | {"num_local_experts": 4},
        RUNS,
    ),
    "Qwen3-30B-A3B-FP8": (QWEN_3_MOE | {"quantization_config": FP8}, "quantization_config"),
    "Qwen3-MoE with a shared expert": (
        QWEN_3_MOE | {"shared_expert_intermediate_size": 48},
        "shared_expert_intermediate_size",
    ),
    # Files that are not whole
    "no num_attention_heads": (without(LLAMA, "num_attention_heads"), "num_attention_heads"),
    "no model_type": (without(QWEN_3, "model_type"), "model_type"),
    "another family": (LLAMA | {"model_type": "gpt2"}, "model_type"),
    "num_key_value_heads: null": (LLAMA | {"num_key_value_heads": None, "head_dim": None}, RUNS),
    "Qwen2, head_dim: null": (QWEN_2 | {"head_dim": None, "rope_scaling": YARN}, RUNS),
    "Qwen3, head_dim: null": (QWEN_3 | {"head_dim": None}, "head_dim"),
    "architectures: null": (QWEN_3 | {"architectures": None}, RUNS),
    "flash attention named": (QWEN_3 | {"attn_implementation": "flash_attention_2"}, RUNS),
    "sizes as text": (QWEN_3 | {"hidden_size": "64"}, "hidden_size"),
}
