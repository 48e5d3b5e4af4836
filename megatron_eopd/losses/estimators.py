"""The terms of an objective: estimators of reverse and forward KL, gates, and token weights.

To add one, write a function here and give it a row in megatron_eopd/objectives.py. What it may use
is in TokenSignals; the sweeps over the vocabulary stay as they are.

p: teacher, q: student, q_old: the student that wrote the tokens, x: the sampled token, H: the
teacher's entropy.
"""
# Shapes: N tokens, K top-k tokens.

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses.divergences import KLTerms
from megatron_eopd.losses.kernels import LOWEST
from megatron_eopd.losses.overlap import Overlap
from megatron_eopd.losses.picked_tokens import PickedTokens
from megatron_eopd.losses.vocab_sum import Integrand


@dataclass(frozen=True)
class TokenSignals:
    """What is known of each token: everything an estimator may use."""

    kl: KLTerms
    """Exact, over the full vocabulary. Each [N]."""
    picked: PickedTokens
    """log q and log p of the sampled token [N] and of the top k [N, K]."""
    rollout_logprobs_N: torch.Tensor
    """log q_old(x), as the engine that sampled x reported it."""
    sum_over_vocab: Callable[[Integrand], torch.Tensor]
    """Σ_v h(log q(v), log p(v)) as [N], for any pointwise h; one more sweep each."""
    overlap: Callable[[], Overlap]
    """Of both models' `objective.top_k` most probable tokens, whatever the support; one more pass
    over one model's logits."""


def full_reverse_kl(signals: TokenSignals, objective: ObjectiveConfig) -> torch.Tensor:
    """KL(q ‖ p)."""
    return signals.kl.reverse_kl


def full_forward_kl(signals: TokenSignals, objective: ObjectiveConfig) -> torch.Tensor:
    """KL(p ‖ q)."""
    return signals.kl.forward_kl


def sampled_reverse_kl(signals: TokenSignals, objective: ObjectiveConfig) -> torch.Tensor:
    """max(−r·A, −clip(r, 1 − ε, 1 + ε)·A) with A = log p(x) − log q_old(x), r = q(x) / q_old(x).

    The paper's L_OPD (arXiv 2603.07079): A is an advantage, a constant; taken as a loss itself its
    gradient would not see the teacher.
    """
    advantage_N = signals.picked.sampled_teacher_logprobs - signals.rollout_logprobs_N
    return _clipped_surrogate(signals, advantage_N, objective.clip_ratio)


def vopd_reverse_kl(signals: TokenSignals, objective: ObjectiveConfig) -> torch.Tensor:
    """As `sampled`, with A + KL(q ‖ p) for A: the mean of A over x ~ q is −KL(q ‖ p), so this
    advantage has mean 0, and the gradient the same mean with less variance (vOPD)."""
    advantage_N = signals.picked.sampled_teacher_logprobs - signals.rollout_logprobs_N
    return _clipped_surrogate(signals, advantage_N + signals.kl.reverse_kl, objective.clip_ratio)


def _clipped_surrogate(
    signals: TokenSignals, advantage_N: torch.Tensor, clip_ratio: float
) -> torch.Tensor:
    advantage_N = advantage_N.detach()
    ratio_N = (signals.picked.sampled_student_logprobs - signals.rollout_logprobs_N).exp()
    clipped_N = ratio_N.clamp(1 - clip_ratio, 1 + clip_ratio)
    return torch.maximum(-ratio_N * advantage_N, -clipped_N * advantage_N)


def top_k_reverse_kl(signals: TokenSignals, objective: ObjectiveConfig) -> torch.Tensor:
    """Σ_{v ∈ S} q(v)·[log q(v) − log p(v)], S and its normalisation as the options say."""
    student, teacher = _on_support(signals.picked, objective.top_k_normalization)
    return (student.exp() * (student - teacher)).sum(-1)


def top_k_forward_kl(signals: TokenSignals, objective: ObjectiveConfig) -> torch.Tensor:
    """Σ_{v ∈ S} p(v)·[log p(v) − log q(v)]; by default the paper's: S the teacher's top k, p
    renormalised on S, q over the full vocabulary. Never clamped: a negative value has a gradient.
    """
    student, teacher = _on_support(signals.picked, objective.top_k_normalization)
    return (teacher.exp() * (teacher - student)).sum(-1)


def _on_support(picked: PickedTokens, normalization: str) -> tuple[torch.Tensor, torch.Tensor]:
    """log q and log p on the support, [N, K], or [N, K + 1] with one entry for all other tokens."""
    student, teacher = (
        x.where(picked.top_valid, LOWEST)
        for x in (picked.top_student_logprobs, picked.top_teacher_logprobs)
    )
    if normalization == "tail":
        return _with_tail(student), _with_tail(teacher)
    if normalization in ("student", "both"):
        student = student.log_softmax(-1)
    if normalization in ("teacher", "both"):
        teacher = teacher.log_softmax(-1)
    return student, teacher


SMALLEST_TAIL = 1e-6
"""float32 does not know a rest of 1 − Σ more exactly."""


def _with_tail(logprobs_NK: torch.Tensor) -> torch.Tensor:
    inside_N1 = logprobs_NK.logsumexp(-1, keepdim=True).clamp(max=math.log1p(-SMALLEST_TAIL))
    return torch.cat([logprobs_NK, torch.log(-torch.expm1(inside_N1))], dim=-1)


def skewed_forward_kl(signals: TokenSignals, objective: ObjectiveConfig) -> torch.Tensor:
    """KL(p ‖ s·p + (1 − s)·q), s = objective.skew (DistiLLM, arXiv 2402.03898)."""

    def integrand(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        return log_p.exp() * (log_p - _log_mixture(log_p, log_q, objective.skew))

    return signals.sum_over_vocab(integrand)


def skewed_reverse_kl(signals: TokenSignals, objective: ObjectiveConfig) -> torch.Tensor:
    """KL(q ‖ s·q + (1 − s)·p), s = objective.skew (DistiLLM)."""

    def integrand(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        return log_q.exp() * (log_q - _log_mixture(log_q, log_p, objective.skew))

    return signals.sum_over_vocab(integrand)


def jensen_shannon(signals: TokenSignals, objective: ObjectiveConfig) -> torch.Tensor:
    """β·KL(p ‖ m) + (1 − β)·KL(q ‖ m), m = β·p + (1 − β)·q, β = objective.jsd_beta (GKD, arXiv
    2306.13649)."""
    beta = objective.jsd_beta

    def integrand(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        log_m = _log_mixture(log_p, log_q, beta)
        return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)

    return signals.sum_over_vocab(integrand)


def _log_mixture(log_a: torch.Tensor, log_b: torch.Tensor, share_of_a: float) -> torch.Tensor:
    return torch.logaddexp(log_a + math.log(share_of_a), log_b + math.log1p(-share_of_a))


# A gate: (signals, threshold in nats, options) → how far it is open [N], 0 to 1. The threshold of a
# quantile is a scalar tensor: nobody asks the device for it.


def hard_gate(
    signals: TokenSignals, threshold: float | torch.Tensor, _: ObjectiveConfig
) -> torch.Tensor:
    """1[H ≥ τ]."""
    return (signals.kl.teacher_entropy >= threshold).float()


def sigmoid_gate(
    signals: TokenSignals, threshold: float | torch.Tensor, objective: ObjectiveConfig
) -> torch.Tensor:
    """sigmoid((H − τ) / width)."""
    return torch.sigmoid((signals.kl.teacher_entropy - threshold) / objective.gate_width)


def student_gate(
    signals: TokenSignals, threshold: float | torch.Tensor, _: ObjectiveConfig
) -> torch.Tensor:
    """1[H(q) ≥ τ], without a gradient."""
    return (signals.kl.student_entropy >= threshold).float()


def disagreement_gate(
    signals: TokenSignals, _: float | torch.Tensor, objective: ObjectiveConfig
) -> torch.Tensor:
    """1[|top_k(p) ∩ top_k(q)| / k ≤ gate_max_overlap]."""
    return (signals.overlap().share <= objective.gate_max_overlap).float()


def open_gate(signals: TokenSignals, *_: object) -> torch.Tensor:
    return torch.ones_like(signals.kl.teacher_entropy)


def closed_gate(signals: TokenSignals, *_: object) -> torch.Tensor:
    return torch.zeros_like(signals.kl.teacher_entropy)


def _all_alike(values_N: torch.Tensor, _: ObjectiveConfig) -> torch.Tensor:
    return torch.ones_like(values_N)


def _late_tokens(position_N: torch.Tensor, _: ObjectiveConfig) -> torch.Tensor:
    """Answers count more than what leads to them: 0.25 at the start, 1 from 60 % of the response
    on."""
    return 0.25 + 0.75 * torch.sigmoid((position_N - 0.30) / 0.10)


def _early_tokens(position_N: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """1 + γ·(1 − position). What IW-OPD's weight (arXiv 2606.22600), 1 + γ·(1 − Σ_{s<t}|A_s| /
    Σ_s|A_s|), is for a response along which both models are apart by equal amounts |A|."""
    return 1 + objective.early_token_gain * (1 - position_N)


def _confident_teacher(entropy_N: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """f + (1 − f)·exp(−H / scale): 1 where the teacher is sure, never below f."""
    floor = objective.entropy_weight_floor
    return floor + (1 - floor) * torch.exp(-entropy_N / objective.entropy_weight_scale)


Weight = Callable[[torch.Tensor, ObjectiveConfig], torch.Tensor]

TOKEN_WEIGHTS: dict[str, Weight] = {
    "uniform": _all_alike,
    "position": _late_tokens,
    "early": _early_tokens,
}
"""Relative position of each token in its response, 0 to 1 → its weight [N]."""

ENTROPY_WEIGHTS: dict[str, Weight] = {
    "uniform": _all_alike,
    "confidence": _confident_teacher,
}
"""The teacher's entropy at each token, in nats → its weight [N]."""
