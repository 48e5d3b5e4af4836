"""What Megatron-LM's own scripts read beside the weights: the tracker file, and common.pt.

Follows megatron/training/checkpointing.py (load_args_from_checkpoint, load_checkpoint). In: the
model. Out: a dict for torch.save, of numbers, texts and one argparse.Namespace, which torch loads
with weights_only=True. What --use-checkpoint-args does not take over is said by `extra_options`.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megatron_eopd.config import ModelConfig
from megatron_eopd.model_paths import RELEASE, TRACKER, iteration_name
from megatron_eopd.models.megatron_config import transformer_config
from megatron_eopd.parallel.layout import Layout, pad_vocab_size

VOCAB_DIVISOR = 128
"""Megatron-LM's default of --make-vocab-size-divisible-by."""
# What --use-rope-scaling of Megatron-LM fixes beside the factor.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Root:
    """The layout of a directory for Megatron-LM's --load."""

    iteration: int | None
    """Of the checkpoint in it; None is a release: Megatron-LM then starts at iteration 0, and asks
    for no optimizer or RNG state, which there is none of."""

    @property
    def name(self) -> str:
        return iteration_name(self.iteration)

    def write_tracker(self, directory: Path) -> None:
        text = RELEASE if self.iteration is None else str(self.iteration)
        (directory / TRACKER).write_text(text)

    def common_state(self, hf_config: PretrainedConfig, layout: Layout) -> dict[str, Any]:
        """Contents of common.pt."""
        return {
            "args": model_args(hf_config, transformer_config(hf_config, ModelConfig(), layout)),
            "checkpoint_version": 3.0,
            "iteration": self.iteration or 0,
            "num_floating_point_operations_so_far": 0,
            # How Megatron's sharded_state_dict forms its keys: layers stacked, fc1 in one.
            "content_metadata": {"singleton_local_shards": False},
        }


def model_args(hf_config: PretrainedConfig, config: TransformerConfig) -> Namespace:
    """Megatron-LM's arguments that make the model what it is, by their names there.

    Those that describe a run (sizes of batches, dropout aside) or a machine are left to the user:
    a value here would win over the command line.
    """
    experts = {
        "num_experts": config.num_moe_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_layer_freq": config.moe_layer_freq,
        "moe_router_topk": config.moe_router_topk,
        "moe_router_pre_softmax": config.moe_router_pre_softmax,
        "moe_router_score_function": config.moe_router_score_function,
    }
    return Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=True,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        qk_layernorm=config.qk_layernorm,
        add_bias_linear=config.add_bias_linear,
        add_qkv_bias=config.add_qkv_bias,
        swiglu=True,
        squared_relu=False,
        normalization=config.normalization,
        norm_epsilon=config.layernorm_epsilon,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        # Megatron-LM's default is 0.1, and these models have none.
        attention_dropout=0.0,
        hidden_dropout=0.0,
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=int(hf_config.rope_parameters["rope_theta"]),
        rotary_percent=1.0,
        rotary_interleaved=False,
        max_position_embeddings=hf_config.max_position_embeddings,
        untie_embeddings_and_output_weights=not hf_config.tie_word_embeddings,
        make_vocab_size_divisible_by=VOCAB_DIVISOR,
        # Stored without padding, which Megatron-Core adds as it loads.
        padded_vocab_size=pad_vocab_size(hf_config.vocab_size, VOCAB_DIVISOR, tp=1),
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
        ckpt_format="torch_dist",
        **(experts if config.num_moe_experts else {}),
    )


def load_options(root: Root, out: Path, hf_config: PretrainedConfig, layout: Layout) -> str:
    """Megatron-LM's command-line options to start from what was written to `out`."""
    options = [f"--load {out}", "--use-checkpoint-args", "--ckpt-format torch_dist"]
    if root.iteration is not None:
        options.append("--no-load-optim --no-load-rng")
    options += extra_options(hf_config, transformer_config(hf_config, ModelConfig(), layout))
    options.append(f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {out / root.name}")
    return " ".join(options)


def extra_options(hf_config: PretrainedConfig, config: TransformerConfig) -> list[str]:
    """What makes the model and --use-checkpoint-args leaves alone."""
    options = [f"--norm-epsilon {config.layernorm_epsilon:g}"]
    if config.qk_layernorm:
        options.append("--qk-layernorm")
    if config.moe_router_dtype:
        options.append(f"--moe-router-dtype {config.moe_router_dtype}")
    rope = hf_config.rope_parameters
    if rope["rope_type"] == "linear":
        options.append(f"--rotary-seq-len-interpolation-factor {rope['factor']:g}")
    elif rope["rope_type"] == "llama3" and rope.items() >= _LLAMA3.items():
        options.append(f"--use-rope-scaling --rope-scaling-factor {rope['factor']:g}")
    elif rope["rope_type"] != "default":
        options.append(f"(and an equivalent of config.json's rope_parameters {dict(rope)})")
    return options
