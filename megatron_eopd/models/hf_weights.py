"""Hugging Face tensors into tensor-, pipeline- and expert-parallel shards, and back.

Each rank reads only the slices it keeps, so nothing is ever loaded whole and no rank waits for
another. `fill_shard` (in) and `join` (out) are each other's inverse; the start-up of a run, the
conversion of checkpoints, the export and the weight sync all go through these two.
"""
# Shapes: A query heads, G key/value heads (query groups), D head dim, H hidden size, V vocabulary.

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_eopd.models.families import family_of
from megatron_eopd.models.families.base import Mapping, Split
from megatron_eopd.models.hf_files import HFCheckpoint, TensorSlice
from megatron_eopd.parallel.collectives import gather_everywhere
from megatron_eopd.parallel.layout import Layout

READ_BYTES = 64 * 2**20
"""Rows are copied out of a file in steps of about this size: that much is held twice, not more."""


@dataclass(frozen=True)
class HeadShape:
    """What the QKV split needs to know of the attention."""

    num_heads: int
    num_groups: int
    head_dim: int


def head_shape(hf_config: PretrainedConfig) -> HeadShape:
    heads = hf_config.num_attention_heads
    # Qwen2's config has the field only where it differs.
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    return HeadShape(heads, hf_config.num_key_value_heads, head_dim)


def num_experts(hf_config: PretrainedConfig) -> int:
    """0 in a dense model."""
    return getattr(hf_config, "num_experts", 0)


@dataclass(frozen=True)
class Weight:
    """A parameter of this rank: its row of the family's table, and which layer and expert it is."""

    row: Mapping
    layer: int
    """Counted over all pipeline stages."""
    expert: int
    """Counted among the rank's own `num_local_experts`."""
    num_local_experts: int
    tied_head: bool

    def hf_names(self, ep_rank: int) -> tuple[str, ...]:
        """Of this parameter on an expert-parallel rank; in a dense layer the same on all."""
        if self.tied_head:
            return ("model.embed_tokens.weight",)
        expert = ep_rank * self.num_local_experts + self.expert
        return tuple(name.format(i=self.layer, e=expert) for name in self.row.hf)

    def place(self, layout: Layout) -> tuple[int, int]:
        """(rank, size) of the tensor-parallel group that the parameter is cut over."""
        if self.row.is_expert:
            return layout.expert_tp_rank, layout.expert_tp
        return layout.tp_rank, layout.tp


def weights_of(model: torch.nn.Module, hf_config: PretrainedConfig) -> dict[str, Weight]:
    """Parameter name on this rank → what it is.

    Pipeline stages number their layers from 0; a layer itself knows its number in the whole model.
    """
    family = family_of(hf_config.model_type)
    rows = {name: row for row in family.mappings for name in row.megatron}
    layers = model.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    found = {}
    for name, _ in model.named_parameters():
        pattern, layer, expert = _pattern_of(name)
        assert pattern in rows, f"no row for parameter {name} of {family.architecture}"
        tied_head = hf_config.tie_word_embeddings and name == "output_layer.weight"
        found[name] = Weight(rows[pattern], first_layer + layer, expert, 0, tied_head)
    experts = 1 + max((weight.expert for weight in found.values()), default=0)
    return {name: replace(weight, num_local_experts=experts) for name, weight in found.items()}


def _pattern_of(name: str) -> tuple[str, int, int]:
    """The name with `{i}` and `{e}` in the place of layer and expert, and those two numbers."""
    numbers = {"i": 0, "e": 0}
    for letter, before in (
        ("i", r"decoder\.layers\."),
        ("e", r"local_experts\.|linear_fc\d\.weight"),
    ):
        match = re.search(rf"(?<!\w)(?:{before})(\d+)", name)
        if match:
            numbers[letter] = int(match[1])
            name = f"{name[: match.start(1)]}{{{letter}}}{name[match.end(1) :]}"
    return name, numbers["i"], numbers["e"]


def fill_shard(
    out: torch.Tensor,
    split: Split,
    wholes: Sequence[torch.Tensor | TensorSlice],
    rank: int,
    size: int,
    heads: HeadShape,
) -> None:
    """Write rank's part of the whole HF tensors into `out`, casting to its dtype."""
    if split is Split.REPLICATED:
        _copy(out, wholes[0])
    elif split is Split.ROW:
        columns = out.shape[1]
        _copy(out, wholes[0], column=rank * columns)
    elif split is Split.GATE_UP:
        for half, whole in zip(out.chunk(2), wholes, strict=True):
            _copy(half, whole, row=rank * half.shape[0])
    elif split is Split.VOCAB:
        first = rank * out.shape[0]
        kept = min(max(wholes[0].shape[0] - first, 0), out.shape[0])
        _copy(out[:kept], wholes[0], row=first)
        out[kept:].zero_()
    else:
        assert split is Split.QKV, split
        for part, whole in zip(_qkv_views(out, heads), wholes, strict=True):
            rows = part.shape[0] * part.shape[1]
            part.copy_(whole[rank * rows : (rank + 1) * rows].view(part.shape))


def _copy(
    out: torch.Tensor, whole: torch.Tensor | TensorSlice, row: int = 0, column: int = 0
) -> None:
    """Rows (and columns) of `whole` from the given place on, as many as `out` has."""
    row_bytes = max(out[:1].nbytes, 1)
    step = max(READ_BYTES // row_bytes, 1)
    for start in range(0, out.shape[0], step):
        part = out[start : start + step]
        rows = slice(row + start, row + start + part.shape[0])
        part.copy_(whole[rows] if out.dim() == 1 else whole[rows, column : column + out.shape[1]])


def _qkv_views(qkv: torch.Tensor, heads: HeadShape) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a shard, each [query groups, rows, …] of the same memory."""
    per_group = heads.num_heads // heads.num_groups
    widths = [per_group * heads.head_dim, heads.head_dim, heads.head_dim]
    return qkv.unflatten(0, (-1, sum(widths))).split(widths, dim=1)


def join(
    split: Split, shards: Sequence[torch.Tensor], heads: HeadShape, vocab: int
) -> list[torch.Tensor]:
    """The whole HF tensors from the shards of all tensor-parallel ranks. Inverse of `fill_shard`.

    A single shard is not copied, except for its queries, keys and values.
    """
    if split is Split.REPLICATED:
        return [shards[0]]
    if split is Split.ROW:
        return [_cat(shards, dim=1)]
    if split is Split.VOCAB:
        return [_cat(shards)[:vocab]]
    if split is Split.GATE_UP:
        return [_cat(parts) for parts in zip(*(s.chunk(2) for s in shards), strict=True)]
    assert split is Split.QKV, split
    return [part.flatten(0, 1) for part in _qkv_views(_cat(shards), heads)]


def _cat(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def hf_shapes(
    split: Split, parameter: torch.Tensor, size: int, heads: HeadShape, vocab: int
) -> list[tuple[int, ...]]:
    """Shapes of the whole HF tensors that `size` shards like this parameter make up."""
    # Meta tensors, joined by the real function: no second set of shape rules.
    shards = [torch.empty_like(parameter, device="meta")] * size
    return [tuple(whole.shape) for whole in join(split, shards, heads, vocab)]


def load_hf_weights(
    chunks: Sequence[torch.nn.Module],
    hf_path: Path,
    hf_config: PretrainedConfig,
    layout: Layout,
    group: dist.ProcessGroup,
) -> None:
    """Fill this rank's parameters from a Hugging Face directory.

    Collective over `group`, all ranks of the model: only together do they know which tensors of
    the directory nobody asks for. What follows is each rank's own, so an error may be one rank's.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, unexpected, or of
            another shape or kind (all of them are listed, not only the first).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for chunk in chunks:
        shapes |= whole_shapes(chunk, weights_of(chunk, hf_config), hf_config, layout)
    names = gather_everywhere(list(shapes), group)
    asked_for = {name for rank in names for name in rank}
    with HFCheckpoint(hf_path) as checkpoint:
        checkpoint.check(shapes, asked_for, tied=hf_config.tie_word_embeddings)
        for chunk in chunks:
            _fill_parameters(chunk, checkpoint, hf_config, layout)


def _fill_parameters(
    model: torch.nn.Module, checkpoint: HFCheckpoint, hf_config: PretrainedConfig, layout: Layout
) -> None:
    heads = head_shape(hf_config)
    weights = weights_of(model, hf_config)
    for name, parameter in model.named_parameters():
        weight = weights[name]
        wholes = [checkpoint.slice(hf_name) for hf_name in weight.hf_names(layout.ep_rank)]
        rank, size = weight.place(layout)
        fill_shard(parameter.data, weight.row.split, wholes, rank, size, heads)


def whole_shapes(
    model: torch.nn.Module,
    weights: dict[str, Weight],
    hf_config: PretrainedConfig,
    layout: Layout,
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every whole HF tensor that this rank holds a part of."""
    heads, vocab = head_shape(hf_config), hf_config.vocab_size
    shapes = {}
    for name, parameter in model.named_parameters():
        weight = weights[name]
        _, size = weight.place(layout)
        wholes = hf_shapes(weight.row.split, parameter, size, heads, vocab)
        shapes |= zip(weight.hf_names(layout.ep_rank), wholes, strict=True)
    return shapes
