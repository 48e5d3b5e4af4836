"""Causal core attention on PyTorch's scaled_dot_product_attention, for the local specification.

Stands where Megatron's DotProductAttention would: it never builds the [S, S] score matrix, and it
takes grouped key/value heads without repeating them. Sequences are padded on the right, so the
causal mask alone keeps padding out of every real token.
"""
# Shapes: S tokens, B sequences, A query heads and G key/value heads of this rank, D head dim.

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig


class SDPACoreAttention(torch.nn.Module):
    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, f"only causal attention, not {attn_mask_type}"
        assert config.attention_dropout == 0, "distillation runs without dropout"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBAD: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """Returns [S, B, A·D]."""
        assert packed_seq_params is None, "packed sequences are not supported by this attention"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBAD, key_SBGD, value_SBGD))
        out_BASD = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out_BASD.permute(2, 0, 1, 3).flatten(2)
