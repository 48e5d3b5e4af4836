"""Rotary embeddings and causal core attention, for the local specification.

Stands where Megatron's DotProductAttention would: it never builds the [S, S] score matrix of a
packed row, keeps its sequences apart, and takes grouped key/value heads without repeating them.
It turns queries and keys itself, by sines and cosines that were made once for all layers: Megatron
asks the device for the sequences' lengths in each of them, twice.
Under context parallelism every rank gathers all keys and values, which is exact and simple;
TransformerEngine's ring exchange, which holds less at a time, comes with its own specification.
"""
# Shapes: S tokens of this rank, B sequences, Q and L the longest of them here and in the whole,
# A query heads and G key/value heads of this rank, D head dim.

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.varlen import varlen_attn

from megatron_eopd.models.rope import rotate
from megatron_eopd.records import PackedSequences, Unpacking


def unpacks(on_gpu: bool, dtype: torch.dtype, cp: int) -> bool:
    """Whether attention works on padded sequences instead of on the row itself: flash attention has
    no float32, and here no context parallelism."""
    return not on_gpu or dtype == torch.float32 or cp > 1


class SDPACoreAttention(torch.nn.Module):
    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, f"only causal attention, not {attn_mask_type}"
        assert config.attention_dropout == 0, "distillation runs without dropout"
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query_SAD: torch.Tensor,
        key_SGD: torch.Tensor,
        value_SGD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Returns [S, A·D]. Under context parallelism: forward one all-gather each of keys and
        values, backward one reduce-scatter each."""
        packed = packed_seq_params
        query_SAD, key_SGD = (rotate(x, packed.rotation) for x in (query_SAD, key_SGD))
        if packed.unpacking is None:
            return self._flash(query_SAD, key_SGD, value_SGD, packed)
        visible_B1QL = None
        if self.cp_group.size() > 1:
            key_SGD, value_SGD = (
                gather_from_sequence_parallel_region(x, group=self.cp_group)
                for x in (key_SGD, value_SGD)
            )
            rows = packed.unpacking
            positions_L = torch.arange(rows.key_rows_BL.shape[1], device=query_SAD.device)
            # A row where a sequence has no token counts as its first: no softmax over nothing.
            visible_B1QL = (positions_L <= rows.query_positions_BQ.unsqueeze(-1)).unsqueeze(1)
        return self._padded(query_SAD, key_SGD, value_SGD, packed.unpacking, visible_B1QL)

    def _padded(
        self,
        query_SAD: torch.Tensor,
        key_SGD: torch.Tensor,
        value_SGD: torch.Tensor,
        rows: Unpacking,
        visible_B1QL: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sequences below one another, padded on the right, where the causal mask hides padding."""
        query = _unpack(query_SAD, rows.query_rows_BQ)
        key, value = (_unpack(x, rows.key_rows_BL) for x in (key_SGD, value_SGD))
        out_BAQD = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible_B1QL,
            is_causal=visible_B1QL is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out_BAQD.transpose(1, 2).flatten(0, 1).index_select(0, rows.slots_S).flatten(1)

    def _flash(
        self,
        query_SAD: torch.Tensor,
        key_SGD: torch.Tensor,
        value_SGD: torch.Tensor,
        packed: PackedSequences,
    ) -> torch.Tensor:
        """Flash attention on the packed row itself."""
        out_SAD = varlen_attn(
            query_SAD,
            key_SGD,
            value_SGD,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal
            enable_gqa=query_SAD.shape[1] != key_SGD.shape[1],
        )
        return out_SAD.flatten(1)


def _unpack(x_SAD: torch.Tensor, rows_BL: torch.Tensor) -> torch.Tensor:
    """[B, A, L, D]. index_select, because its gradient is many times faster than indexing's."""
    return x_SAD.index_select(0, rows_BL.flatten()).unflatten(0, rows_BL.shape).transpose(1, 2)
