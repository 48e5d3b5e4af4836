"""The per-token objective: a reverse-KL part, a gate on the teacher's entropy, a forward-KL part.

    loss = [reverse KL] + α · gate(H) · [forward KL]

A preset says which parts are on (method: Entropy-aware On-Policy Distillation, arXiv 2603.07079,
with full-vocabulary terms in the place of the paper's sampled and top-k ones).
"""
# Shapes: N valid response tokens.

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses.divergences import KLTerms


@dataclass(frozen=True)
class Preset:
    reverse_kl: bool
    forward_kl: Literal["always", "entropy_gate", "never"]


PRESETS = {
    "eopd": Preset(reverse_kl=True, forward_kl="entropy_gate"),
    "opd": Preset(reverse_kl=True, forward_kl="never"),
    "fkl": Preset(reverse_kl=False, forward_kl="always"),
}


def token_objective(
    terms: KLTerms, objective: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_N, gate_N), float32: each token's loss in nats, and how far its gate is open (0 to 1).

    The gate at a token comes from the teacher's entropy at that same token. The caller divides the
    sum of loss_N by the number of valid tokens of all ranks and microbatches.
    """
    preset = PRESETS[objective.name]
    gate_N = _gate(terms.teacher_entropy, preset, objective)
    loss_N = objective.forward_kl_weight * gate_N * terms.forward_kl
    if preset.reverse_kl:
        loss_N = loss_N + terms.reverse_kl
    return loss_N, gate_N


def _gate(entropy_N: torch.Tensor, preset: Preset, objective: ObjectiveConfig) -> torch.Tensor:
    if preset.forward_kl == "entropy_gate":
        return (entropy_N >= objective.entropy_threshold).float()
    return torch.full_like(entropy_N, float(preset.forward_kl == "always"))
