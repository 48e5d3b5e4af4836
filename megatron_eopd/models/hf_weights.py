"""Hugging Face safetensors into tensor- and pipeline-parallel shards. In: directory, model.

Each rank reads only the slices it keeps, so nothing is ever loaded whole and no rank waits for
another. The way out is models.export; both use the functions `shard` and `join` of this file,
which are each other's inverse.
"""
# Shapes: A query heads, G key/value heads (query groups), D head dim, H hidden size, V vocabulary.

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from megatron_eopd.models.families import family_of
from megatron_eopd.models.families.base import Family, Mapping, Split
from megatron_eopd.parallel.layout import Layout


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another model."""


@dataclass(frozen=True)
class HeadShape:
    """What the QKV split needs to know of the attention."""

    num_heads: int
    num_groups: int
    head_dim: int

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> "HeadShape":
        return cls(hf_config.num_attention_heads, hf_config.num_key_value_heads, hf_config.head_dim)


def global_names(model: torch.nn.Module, family: Family, tied: bool) -> dict[str, Mapping]:
    """Parameter name on this rank → its row of the table, `{i}` filled in.

    Pipeline stages number their layers from 0; a layer itself knows its number in the whole model.
    """
    by_megatron_name = {name: row for row in family.mappings for name in row.megatron}
    layers = model.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    named = {}
    for name, _ in model.named_parameters():
        index = re.search(r"decoder\.layers\.(\d+)\.", name)
        pattern = re.sub(r"(?<=decoder\.layers\.)\d+", "{i}", name)
        assert pattern in by_megatron_name, f"no row for parameter {name} of {family.architecture}"
        row = by_megatron_name[pattern]
        layer = first_layer + int(index[1]) if index else 0
        hf_names = tuple(hf.format(i=layer) for hf in row.hf)
        if tied and name == "output_layer.weight":
            hf_names = ("model.embed_tokens.weight",)
        named[name] = Mapping((name,), hf_names, row.split)
    return named


def shard(
    split: Split,
    wholes: Sequence,
    rank: int,
    size: int,
    heads: HeadShape,
    padded_vocab: int,
) -> torch.Tensor:
    """Rank's part of the whole HF tensors (or of safetensors slices, which read what is cut)."""

    def part(whole) -> torch.Tensor:
        count = _shape(whole)[0] // size
        return whole[rank * count : (rank + 1) * count]

    if split is Split.REPLICATED:
        return wholes[0][:]
    if split is Split.ROW:
        count = _shape(wholes[0])[1] // size
        return wholes[0][:, rank * count : (rank + 1) * count]
    if split is Split.GATE_UP:
        return torch.cat([part(whole) for whole in wholes])
    if split is Split.VOCAB:
        vocab, count = _shape(wholes[0])[0], padded_vocab // size
        start = min(rank * count, vocab)
        kept = wholes[0][start : min(start + count, vocab)]
        return torch.nn.functional.pad(kept, (0, 0, 0, count - kept.shape[0]))
    assert split is Split.QKV, split
    groups = heads.num_groups // size
    by_group = [part(whole).reshape(groups, -1, _shape(whole)[1]) for whole in wholes]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def join(
    split: Split, shards: Sequence[torch.Tensor], heads: HeadShape, vocab: int
) -> list[torch.Tensor]:
    """The whole HF tensors from the shards of all tensor-parallel ranks. Inverse of `shard`."""
    if split is Split.REPLICATED:
        return [shards[0]]
    if split is Split.ROW:
        return [torch.cat(list(shards), dim=1)]
    if split is Split.VOCAB:
        return [torch.cat(list(shards))[:vocab]]
    if split is Split.GATE_UP:
        gates, ups = zip(*(s.chunk(2) for s in shards), strict=True)
        return [torch.cat(gates), torch.cat(ups)]
    assert split is Split.QKV, split
    per_group = heads.num_heads // heads.num_groups
    qkv = torch.cat(list(shards)).unflatten(0, (heads.num_groups, (per_group + 2) * heads.head_dim))
    widths = [per_group * heads.head_dim, heads.head_dim, heads.head_dim]
    return [part.flatten(0, 1) for part in qkv.split(widths, dim=1)]


def _shape(whole) -> list[int]:
    return list(whole.shape) if isinstance(whole, torch.Tensor) else whole.get_shape()


class HFCheckpoint:
    """The safetensors files of a directory, read slice by slice."""

    def __init__(self, hf_path: Path) -> None:
        self.path = Path(hf_path)
        self._stack = ExitStack()
        self._file_of = self._index()

    def __enter__(self) -> "HFCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._file_of)

    def slice(self, name: str):
        return self._file_of[name].get_slice(name)

    def _index(self) -> dict[str, object]:
        index_path = self.path / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index_path.is_file():
            try:
                files = sorted(set(json.loads(index_path.read_text())["weight_map"].values()))
            except (json.JSONDecodeError, KeyError) as error:
                raise CheckpointError(f"{index_path}: not a safetensors index ({error}).") from None
        opened = [self._open(self.path / name) for name in files]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (no dict)

    def _open(self, path: Path):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file. The checkpoint is incomplete.")
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}). The file is damaged or truncated "
                f"({path.stat().st_size} bytes): copy it again."
            ) from None


def load_hf_weights(
    model: torch.nn.Module, hf_path: Path, hf_config: PretrainedConfig, layout: Layout
) -> None:
    """Fill this rank's parameters from a Hugging Face directory.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing or of another shape
            (all of them are listed, not only the first).
    """
    rows = global_names(model, family_of(hf_config.model_type), hf_config.tie_word_embeddings)
    heads = HeadShape.of(hf_config)
    with HFCheckpoint(hf_path) as checkpoint:
        missing = sorted({n for row in rows.values() for n in row.hf} - checkpoint.names())
        if missing:
            raise CheckpointError(
                f"{hf_path}: {len(missing)} tensors that config.json asks for are missing: "
                f"{_some(missing)}"
            )
        wrong = []
        for name, parameter in model.named_parameters():
            row = rows[name]
            wholes = [checkpoint.slice(hf_name) for hf_name in row.hf]
            problem = _copy_shard(parameter, row, wholes, layout, heads)
            if problem:
                wrong.append(problem)
        if wrong:
            raise CheckpointError(f"{hf_path}: tensors do not fit config.json: {_some(wrong)}")


def _copy_shard(
    parameter: torch.nn.Parameter, row: Mapping, wholes: list, layout: Layout, heads: HeadShape
) -> str | None:
    padded_vocab = parameter.shape[0] * layout.tp if row.split is Split.VOCAB else 0
    try:
        part = shard(row.split, wholes, layout.tp_rank, layout.tp, heads, padded_vocab)
    except (RuntimeError, SafetensorError) as error:
        return f"{', '.join(row.hf)}: {error}"
    if part.shape != parameter.shape:
        shapes = [_shape(whole) for whole in wholes]
        return (
            f"{', '.join(row.hf)} of shape {shapes} give a shard {list(part.shape)}, "
            f"expected {list(parameter.shape)}"
        )
    with torch.no_grad():
        parameter.copy_(part)
    return None


def _some(items: Sequence[str], limit: int = 20) -> str:
    more = f" … and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more
