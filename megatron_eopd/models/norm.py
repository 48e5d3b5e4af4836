"""RMSNorm for the local layer specification.

Megatron's own local norm (torch.nn.RMSNorm wrapped) refuses sequence parallelism. Under sequence
parallelism each tensor-parallel rank normalises its part of the sequence, so the weight's gradient
is a partial sum: the flag on the weight makes Megatron all-reduce it.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dim (Zhang & Sennrich, arXiv 1910.07467).

    The statistics are float32 and the result is cast back *before* the weight multiplies it, as
    Qwen3 and Llama do in transformers: the order matters in bfloat16.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normalised = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normalised.to(x.dtype)
