"""What a run makes of every key of a config.json: one table for all families, and one for each.

The keys are those that transformers' and vLLM's code of these families reads, and those that
published files have. A key is honoured, ignored for a reason, or refused; and either of the first
two may take some values only. All of it is asked of the file itself: transformers drops and
rewrites keys while it reads, and vLLM acts on some that transformers does not know.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

Raw = Mapping[str, Any]
"""A config.json as it is written."""


@dataclass(frozen=True)
class Values:
    """Which values of a key are taken; they may depend on the rest of the file."""

    words: str
    includes: Callable[[Any, Raw], bool]


@dataclass(frozen=True)
class Key:
    treatment: str
    """HONOURED, IGNORED or REFUSED."""
    why: str
    values: Values
    """All others are refused."""
    required: bool = False
    also_named: str = ""
    """A key that may stand in its place."""


HONOURED, IGNORED, REFUSED = "honoured", "ignored", "refused"


def one_of(*values: Any) -> Values:
    words = " or ".join(json.dumps(value) for value in values)
    return Values(words, lambda value, raw: any(_same(value, v) for v in values))


def or_null(values: Values) -> Values:
    return Values(
        f"{values.words}, or null", lambda value, raw: value is None or values.includes(value, raw)
    )


def _same(a: Any, b: Any) -> bool:
    """1 and 1.0 are the same number, and 1 is not true."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


ANY = Values("any", lambda value, raw: True)
SIZE = Values("a whole number above 0", lambda value, raw: _is_size(value))
POSITIVE = Values("a number above 0", lambda value, raw: type(value) in (int, float) and value > 0)
NUMBER = Values("a number of 0 or more", lambda v, raw: type(v) in (int, float) and v >= 0)
FLAG = one_of(True, False)
OFF = one_of(None, False)
NULL = one_of(None)
# Where null means hidden_size / num_attention_heads, or as many as num_attention_heads.
EVEN = Values("an even number above 0", lambda value, raw: _is_size(value) and value % 2 == 0)
DIVISOR_OF_HEADS = Values(
    "a divisor of num_attention_heads",
    lambda value, raw: _is_size(value) and raw["num_attention_heads"] % value == 0,
)
LONG_ENOUGH = Values(
    "null or at least max_position_embeddings",
    lambda value, raw: value is None or value >= raw["max_position_embeddings"],
)
FULL_ATTENTION = Values(
    'a list of "full_attention"',
    lambda value, raw: isinstance(value, list) and set(value) == {"full_attention"},
)


def size(why: str, values: Values = SIZE) -> Key:
    return Key(HONOURED, why, values, required=True)


def honoured(why: str, values: Values) -> Key:
    return Key(HONOURED, why, values)


def ignored(why: str, values: Values = ANY) -> Key:
    return Key(IGNORED, why, values)


def refused(why: str, but: Values = NULL) -> Key:
    """`but`: values that ask for nothing."""
    return Key(REFUSED, why, but)


def _each(names: str, key: Key) -> dict[str, Key]:
    return dict.fromkeys(names.split(), key)


SHARED: dict[str, Key] = {
    **_each("model_type architectures", honoured("the family", ANY)),
    **_each("vocab_size hidden_size intermediate_size num_hidden_layers", size("shapes")),
    **_each("num_attention_heads", size("shapes")),
    "max_position_embeddings": size("prompt and response together are at most as long"),
    "num_key_value_heads": honoured("query groups; null: one a head", or_null(DIVISOR_OF_HEADS)),
    "head_dim": honoured("null: hidden_size / num_attention_heads", or_null(EVEN)),
    "hidden_act": honoured("of the MLP, SwiGLU", one_of("silu")),
    "rms_norm_eps": honoured("of all norms", POSITIVE),
    "tie_word_embeddings": honoured("whether the LM head is the embedding", FLAG),
    **_each("rope_theta rope_parameters rope_scaling", honoured("see below", ANY)),
    "layer_types": honoured("attention has no windows", or_null(FULL_ATTENTION)),
    **_each(
        "eos_token_id",
        honoured("ends a response, unless generation_config.json has another", ANY),
    ),
    # Nothing that changes what the model computes.
    **_each("attention_dropout hidden_dropout resid_pdrop", ignored("no noise in training")),
    **_each("initializer_range neftune_noise_alpha", ignored("of training from the start")),
    **_each("use_cache use_reentrant_checkpointing", ignored("how others run the model")),
    **_each("attn_implementation _attn_implementation", ignored("how others run the model")),
    **_each("_flash_attn_2_enabled use_flash_attn", ignored("how others run the model")),
    **_each("experts_implementation _experts_implementation", ignored("how others run the model")),
    **_each("pretraining_tp", ignored("the order of additions in a product")),
    **_each("chunk_size_feed_forward", ignored("the MLP in pieces")),
    **_each("torch_dtype dtype", ignored("model.dtype is what counts")),
    **_each("transformers_version _name_or_path _commit_hash", ignored("where the file is from")),
    **_each("unsloth_version unsloth_fixed", ignored("where the file is from")),
    **_each("transformers.js_config is_llama_config", ignored("for other programs")),
    **_each("bos_token_id pad_token_id unk_token_id", ignored("the tokenizer has them")),
    **_each("sep_token_id decoder_start_token_id", ignored("the tokenizer has them")),
    **_each("tokenizer_class prefix", ignored("the tokenizer is read from its own files")),
    **_each("output_attentions output_hidden_states", ignored("what transformers returns")),
    **_each("return_dict use_return_dict torchscript", ignored("what transformers returns")),
    **_each("id2label label2id num_labels problem_type", ignored("of classifiers")),
    **_each("finetuning_task task_specific_params", ignored("of classifiers")),
    **_each("temperature top_p top_k do_sample", ignored("the run has its own sampling")),
    **_each("max_length max_new_tokens num_beams", ignored("the run has its own sampling")),
    **_each("repetition_penalty suppress_tokens", ignored("the run has its own sampling")),
    **_each(
        "model_max_length max_sequence_length max_seq_len max_seq_length seq_length seq_len",
        ignored("vLLM allows no longer samples", LONG_ENOUGH),
    ),
    # What would be another model.
    **_each(
        "quantization_config compression_config quantization",
        refused("quantised weights cannot be trained. Take the model they were made of"),
    ),
    "auto_map": refused(
        "the model is code of its own, which does not run here",
        Values("null, or without AutoModelForCausalLM", lambda v, _: not _has_model_code(v)),
    ),
    "is_causal": refused("attention looks back only", one_of(None, True)),
    **_each("is_encoder_decoder add_cross_attention", refused("there is no encoder", OFF)),
    "sliding_window": refused("vLLM would attend to a window only, the trainer to all tokens"),
    "use_sliding_window": refused("attention has no windows", OFF),
    **_each("attention_chunk_size rswa_window", refused("attention has no windows")),
    "dual_chunk_attention_config": refused(
        "vLLM would attend by chunks, the trainer does not. Without the key both are the model up "
        "to the original_max_position_embeddings in it"
    ),
    **_each("alibi is_mm_prefix_lm", refused("no such attention is known", OFF)),
    **_each("clip_qkv attn_logit_softcapping", refused("no such attention is known")),
    **_each("final_logit_softcapping", refused("logits are not capped")),
    **_each("logit_scale logits_scaling", refused("logits are not scaled", one_of(None, 1))),
    **_each("scale_emb embedding_multiplier", refused("nothing is scaled", one_of(None, 1))),
    **_each("residual_multiplier scale_depth", refused("nothing is scaled", one_of(None, 1))),
    **_each("attention_multiplier dim_model_base", refused("nothing is scaled")),
    "head_dtype": refused("the LM head has the type of the model", one_of(None, "model")),
    **_each("per_layer_config block_configs", refused("layers have one shape")),
    "pruned_heads": refused("layers have one shape", one_of(None, {})),
    "hidden_size_per_head": refused("it is head_dim"),
    "num_nextn_predict_layers": refused("there are no such layers", one_of(None, 0)),
    **_each("mlp_bias qkv_bias bias", refused("there are no such biases", OFF)),
    **_each("qk_norm use_qk_norm", refused("queries and keys have no norms", OFF)),
    # Rope beside its own keys.
    **_each(
        "partial_rotary_factor rotary_pct rotary_emb_fraction",
        refused("rope turns whole heads", one_of(None, 1)),
    ),
    "rotary_emb_base": refused("it is rope_theta"),
    "rope_interleaved": refused("rope turns the halves of a head", OFF),
    "use_mrope": refused("positions are one number", OFF),
    **_each("mrope_section xdrope_section", refused("positions are one number")),
    **_each("no_rope_layers no_rope_layer_interval", refused("every layer has rope")),
}

# What Qwen's configuration classes have beside Llama's.
_QWEN = {
    "num_key_value_heads": size("query groups; null: one a head", or_null(DIVISOR_OF_HEADS)),
    "sliding_window": ignored("only use_sliding_window turns it on"),
    "max_window_layers": ignored("only use_sliding_window turns it on"),
}
_QK_NORMS = _each("qk_norm use_qk_norm", ignored("queries and keys have norms", one_of(None, True)))

ALIKE = Values(
    "true or false, attention_bias and mlp_bias alike",
    lambda v, raw: (
        FLAG.includes(v, raw) and raw.get("attention_bias", False) == raw.get("mlp_bias", False)
    ),
)

LLAMA = SHARED | {
    **_each(
        "attention_bias mlp_bias",
        honoured("biases: Megatron-Core has them in attention and MLP, or in neither", ALIKE),
    ),
    "qkv_bias": ignored(
        "vLLM prefers it to attention_bias",
        Values("as attention_bias", lambda v, raw: bool(v) == raw.get("attention_bias", False)),
    ),
    "target_layer_count": refused("a draft model for speculative decoding"),
}

QWEN2 = (
    SHARED
    | _QWEN
    | _each("attention_bias qkv_bias", ignored("queries, keys and values have biases", ANY))
)

QWEN3 = (
    SHARED
    | _QWEN
    | _QK_NORMS
    | {
        "head_dim": honoured("128 where it is missing", EVEN),
        "attention_bias": refused("there are no such biases", one_of(False)),
    }
)

_AT_MOST_NUM_EXPERTS = Values(
    "a whole number above 0, at most num_experts",
    lambda v, raw: _is_size(v) and v <= raw.get("num_experts", raw.get("num_local_experts")),
)

QWEN3_MOE = (
    SHARED
    | _QWEN
    | _QK_NORMS
    | {
        "num_key_value_heads": size("query groups", DIVISOR_OF_HEADS),
        "attention_bias": refused("there are no such biases", one_of(False)),
        "num_experts": replace(size("of a layer"), also_named="num_local_experts"),
        "num_local_experts": honoured(
            "num_experts, as transformers 5 writes it",
            Values("as num_experts", lambda v, raw: v == raw.get("num_experts", v)),
        ),
        "num_experts_per_tok": size("chosen for a token", _AT_MOST_NUM_EXPERTS),
        "moe_intermediate_size": size("shapes"),
        "norm_topk_prob": honoured("whether the chosen experts' shares add up to 1", FLAG),
        "decoder_sparse_step": honoured("every nth layer has experts", SIZE),
        "mlp_only_layers": honoured(
            "layers without experts", Values("null or a list", lambda v, _: _is_list(v))
        ),
        "shared_expert_intermediate_size": refused("no expert is shared", one_of(None, 0)),
        "router_aux_loss_coef": ignored("distillation is the only loss"),
        "output_router_logits": ignored("distillation is the only loss"),
    }
)

ROPE_KEYS = {
    "type": honoured("the old spelling of rope_type", ANY),
    "rope_type": honoured("how the frequencies are scaled", ANY),
    "rope_theta": honoured("base of the frequencies", ANY),
    **_each("factor original_max_position_embeddings", honoured("of the scaling", ANY)),
    **_each("low_freq_factor high_freq_factor", honoured("of llama3", ANY)),
    **_each("beta_fast beta_slow", honoured("of yarn", POSITIVE)),
    **_each("attention_factor mscale mscale_all_dim", honoured("of yarn", or_null(NUMBER))),
    "truncate": honoured("of yarn", FLAG),
    "finetuned": ignored("where the file is from"),
    "partial_rotary_factor": refused("rope turns whole heads", one_of(None, 1)),
    "rope_dim": refused("rope turns whole heads"),
    **_each("mrope_section xdrope_section", refused("positions are one number")),
    "mrope_interleaved": refused("positions are one number", OFF),
    "use_fope": refused("no such rope is known", OFF),
}
"""Of what `rope_parameters` or `rope_scaling` holds."""


def _has_model_code(auto_map: Any) -> bool:
    return isinstance(auto_map, Mapping) and "AutoModelForCausalLM" in auto_map


def _is_list(value: Any) -> bool:
    return value is None or isinstance(value, list)


def problem(keys: Mapping[str, Key], raw: Raw, prefix: str = "") -> str | None:
    """What the first key of the table says against this file, in words, or None.

    prefix: of the keys' names, where they are not those of the file itself.
    """
    for name, key in keys.items():
        if name not in raw:
            if key.required and key.also_named not in raw:
                return f"{prefix}{name} is missing. Copy the file again, or write it there"
            continue
        try:
            is_taken = key.values.includes(raw[name], raw)
        except TypeError:  # text where a number should be
            is_taken = False
        if not is_taken:
            value = shorten(json.dumps(raw[name]), 60, placeholder=" …")
            what = f"{key.why}. It may be {key.values.words}"
            return f"{prefix}{name}={value} is not supported: {what}"
    return None


def unknown(keys: Mapping[str, Key], raw: Raw, prefix: str = "") -> list[str]:
    """The keys of the file that no table has, but for those that say nothing."""
    return [f"{prefix}{name}" for name in raw if name not in keys and raw[name] is not None]
