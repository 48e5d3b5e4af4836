"""How one Megatron parameter is made of Hugging Face tensors, and how it is split over ranks.

A family is a table of Mapping rows and the options of its Megatron model. Loading, converting,
exporting and the weight sync all read the same rows, so a weight that comes in right goes out
right. Rows that a model has no parameter for (a bias, a tied head) are simply not used.
"""

from collections.abc import Callable
from collections.abc import Mapping as Table
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import PretrainedConfig

from megatron_eopd.models.config_keys import Key


class Split(Enum):
    """How a whole HF tensor (or several) becomes one tensor-parallel shard."""

    REPLICATED = "every rank holds all of it"
    ROW = "columns of the weight (input features), in equal parts"
    VOCAB = "rows, after padding the vocabulary"
    QKV = "query, key, value: by query group, each group's queries then its key and value"
    GATE_UP = "gate and up projection: each in equal parts, gate's part before up's"

    @property
    def dim(self) -> int | None:
        """The dim of the Megatron parameter that is cut; None where every rank holds all."""
        return {Split.REPLICATED: None, Split.ROW: 1}.get(self, 0)


@dataclass(frozen=True)
class Mapping:
    """One row of a family's table. `{i}` stands for the layer, counted over all stages, `{e}` for
    the expert: among the rank's own in a Megatron name, among all in a Hugging Face name."""

    megatron: tuple[str, ...]
    """Names of the parameter: on the local specification first, then on TransformerEngine's,
    which fuses some norms into the linear layer behind them, and the experts into one module."""
    hf: tuple[str, ...]
    split: Split

    @property
    def is_expert(self) -> bool:
        """Cut over the expert tensor-parallel ranks, and spread over the expert-parallel ones."""
        return "{e}" in self.hf[0]


@dataclass(frozen=True)
class Family:
    architecture: str
    """As HF's config.json lists it under `architectures`."""
    keys: Table[str, Key]
    """Of config.json: which are honoured, ignored or refused. All others are told."""
    mappings: tuple[Mapping, ...]
    megatron_options: Callable[[PretrainedConfig], dict[str, Any]]
    """Options of Megatron's TransformerConfig that are this family's own."""


M = "decoder.layers.{i}."
H = "model.layers.{i}."

EMBEDDINGS = (
    Mapping(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Split.VOCAB),
    Mapping(("output_layer.weight",), ("lm_head.weight",), Split.VOCAB),
    Mapping(("decoder.final_layernorm.weight",), ("model.norm.weight",), Split.REPLICATED),
)

ATTENTION = (
    Mapping(
        (f"{M}input_layernorm.weight", f"{M}self_attention.linear_qkv.layer_norm_weight"),
        (f"{H}input_layernorm.weight",),
        Split.REPLICATED,
    ),
    Mapping(
        (f"{M}self_attention.linear_qkv.weight",),
        tuple(f"{H}self_attn.{name}_proj.weight" for name in "qkv"),
        Split.QKV,
    ),
    Mapping(
        (f"{M}self_attention.linear_proj.weight",), (f"{H}self_attn.o_proj.weight",), Split.ROW
    ),
)

QKV_BIAS = Mapping(
    (f"{M}self_attention.linear_qkv.bias",),
    tuple(f"{H}self_attn.{name}_proj.bias" for name in "qkv"),
    Split.QKV,
)

QK_NORMS = tuple(
    Mapping(
        (f"{M}self_attention.{name}_layernorm.weight",),
        (f"{H}self_attn.{name}_norm.weight",),
        Split.REPLICATED,
    )
    for name in "qk"
)

MLP = (
    Mapping(
        (f"{M}pre_mlp_layernorm.weight", f"{M}mlp.linear_fc1.layer_norm_weight"),
        (f"{H}post_attention_layernorm.weight",),
        Split.REPLICATED,
    ),
    Mapping(
        (f"{M}mlp.linear_fc1.weight",),
        (f"{H}mlp.gate_proj.weight", f"{H}mlp.up_proj.weight"),
        Split.GATE_UP,
    ),
    Mapping((f"{M}mlp.linear_fc2.weight",), (f"{H}mlp.down_proj.weight",), Split.ROW),
)

E = f"{M}mlp.experts."

EXPERTS = (
    Mapping((f"{M}mlp.router.weight",), (f"{H}mlp.gate.weight",), Split.REPLICATED),
    Mapping(
        (
            f"{M}mlp.experts.local_experts.{{e}}.linear_fc1.weight",
            f"{M}mlp.experts.linear_fc1.weight{{e}}",
        ),
        (f"{H}mlp.experts.{{e}}.gate_proj.weight", f"{H}mlp.experts.{{e}}.up_proj.weight"),
        Split.GATE_UP,
    ),
    Mapping(
        (
            f"{M}mlp.experts.local_experts.{{e}}.linear_fc2.weight",
            f"{M}mlp.experts.linear_fc2.weight{{e}}",
        ),
        (f"{H}mlp.experts.{{e}}.down_proj.weight",),
        Split.ROW,
    ),
)
