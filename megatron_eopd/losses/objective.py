"""The per-token objective, composed of the parts in estimators.py as the options say.

    add           loss = w · { reverse + α · gate · forward }
    interpolate   loss = w · { (1 − λ) · reverse + λ · forward },   λ = α · gate

A preset names the parts, and every part can be replaced by its own option. α and the gate's
threshold τ may move while the run goes on.
"""
# Shapes: N valid response tokens, V this rank's columns of the vocabulary.

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses import estimators
from megatron_eopd.losses.estimators import ENTROPY_WEIGHTS, TOKEN_WEIGHTS, TokenSignals
from megatron_eopd.objectives import FORWARD_KL, GATES, REVERSE_KL
from megatron_eopd.schedules import Progress, scheduled


@dataclass(frozen=True)
class Coefficients:
    """α and τ of one optimizer step."""

    forward_kl_weight: float
    entropy_threshold: float | torch.Tensor
    """A scalar tensor where it is found on the device."""


def coefficients_at(objective: ObjectiveConfig, progress: Progress) -> Coefficients:
    """From the initial to the final values over `objective.schedule_steps`, or the whole run, and
    constant from there on."""
    steps = objective.schedule_steps
    done = progress.share if steps is None else progress.steps / steps

    def between(start: float, end: float | None) -> float:
        return scheduled(start, end, objective.schedule, done)

    return Coefficients(
        between(objective.formula.forward_kl_weight, objective.final_forward_kl_weight),
        between(objective.entropy_threshold, objective.final_entropy_threshold),
    )


class TokenLosses(NamedTuple):
    loss_N: torch.Tensor
    """float32, in nats. The caller divides their sum by the number of valid tokens of all ranks
    and microbatches."""
    gate_N: torch.Tensor
    """How far each token's gate is open, 0 to 1."""
    clipped: dict[str, torch.Tensor]
    """`reverse_kl`, `forward_kl` → bool [N], where the term was above its clip, whatever the gate;
    of the terms that have one."""


def token_objective(
    signals: TokenSignals,
    objective: ObjectiveConfig,
    coefficients: Coefficients,
    weight_N: torch.Tensor | None = None,
) -> TokenLosses:
    """Each token's loss. The gate at a token comes from what is known of that token."""
    formula = objective.formula
    gate = getattr(estimators, GATES[formula.gate].function)
    gate_N = gate(signals, coefficients.entropy_threshold, objective)
    share_N = coefficients.forward_kl_weight * gate_N
    rest_N = 1 - share_N if formula.combine == "interpolate" else 1.0
    loss_N, clipped = torch.zeros_like(gate_N), {}
    for name, row, clip, factor in (
        ("reverse_kl", REVERSE_KL[formula.reverse_kl], objective.reverse_kl_clip, rest_N),
        ("forward_kl", FORWARD_KL[formula.forward_kl], objective.forward_kl_clip, share_N),
    ):
        if row is None:
            continue
        term_N = getattr(estimators, row.function)(signals, objective)
        if clip is not None:
            clipped[name] = term_N > clip
            term_N = term_N.clamp(max=clip)
        loss_N = loss_N + factor * term_N
    return TokenLosses(loss_N if weight_N is None else weight_N * loss_N, gate_N, clipped)


def token_weights(
    position_N: torch.Tensor,
    sampled_ids_N: torch.Tensor,
    teacher_entropy_N: torch.Tensor,
    objective: ObjectiveConfig,
) -> torch.Tensor | None:
    """float32 [N], the product of what the options ask for; None when every token has weight 1."""
    options = (objective.token_weight, objective.entropy_weight)
    if options == ("uniform", "uniform") and not objective.ignored_token_ids:
        return None
    weight_N = TOKEN_WEIGHTS[objective.token_weight](position_N, objective)
    weight_N = weight_N * ENTROPY_WEIGHTS[objective.entropy_weight](teacher_entropy_N, objective)
    # One by one: a tensor of them would be copied to the device, which waits for it.
    for token_id in objective.ignored_token_ids:
        weight_N = weight_N.masked_fill(sampled_ids_N == token_id, 0.0)
    return weight_N
