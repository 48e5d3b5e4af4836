"""What is told of the tokens of a microbatch. In: their losses and terms. Out: means, histograms,
and columns for a recording.

Every rank adds the same names, whatever tokens it has.
"""
# Shapes: N valid tokens of a microbatch, or of a chunk of it.

from collections.abc import Sequence

import torch

from megatron_eopd.losses.objective import TokenLosses
from megatron_eopd.losses.teacher_top_k import TopKTerms
from megatron_eopd.losses.vocab_parallel import TokenTerms
from megatron_eopd.metrics.histogram import LOGPROB_DIFFERENCE
from megatron_eopd.metrics.means import Means
from megatron_eopd.records import Bins

NUM_POSITIONS = 10
"""Equal parts of a response, from its first token to its last."""


def add_loss_metrics(
    means: Means,
    losses: TokenLosses,
    terms: TokenTerms | TopKTerms,
    target_ids_N: torch.Tensor,
    entropies: Bins,
) -> None:
    kl, picked = terms.kl, terms.picked
    gated_N = losses.gate_N >= 0.5
    for name, is_above_N in losses.clipped.items():
        means.add(f"loss/{name}_clipped", is_above_N)
    for name, values_N in (("reverse_kl", kl.reverse_kl), ("forward_kl", kl.forward_kl)):
        means.add(f"loss/{name}", values_N)
        means.add(f"loss/{name}_gated", values_N, gated_N)
        means.add(f"loss/{name}_ungated", values_N, ~gated_N)
    means.add("gate/fraction", losses.gate_N)
    means.add("entropy/teacher_mean", kl.teacher_entropy)
    means.add("entropy/student_mean", kl.student_entropy)
    means.add("entropy/student_gated", kl.student_entropy, gated_N)
    means.keep("entropy/teacher", kl.teacher_entropy, entropies)
    means.keep("entropy/student", kl.student_entropy, entropies)
    mass_N = (picked.top_teacher_logprobs.exp() * picked.top_valid).sum(-1)
    inside_N = ((picked.top_ids == target_ids_N.unsqueeze(-1)) & picked.top_valid).any(-1)
    means.add("topk/teacher_mass", mass_N)
    means.add("topk/sampled_outside", (~inside_N).float())


def add_ends(
    means: Means,
    terms: TokenTerms | TopKTerms,
    target_ids_N: torch.Tensor,
    stop_ids: Sequence[int],
) -> None:
    """What both models think of the tokens that ended a response."""
    is_end_N = torch.zeros_like(target_ids_N, dtype=torch.bool)
    for stop_id in stop_ids:
        is_end_N |= target_ids_N == stop_id
    means.add("end/student_logprob", terms.picked.sampled_student_logprobs, is_end_N)
    means.add("end/teacher_logprob", terms.picked.sampled_teacher_logprobs, is_end_N)


def add_by_source(
    means: Means, losses: TokenLosses, terms: TokenTerms | TopKTerms, sampled_N: torch.Tensor
) -> None:
    """The main figures once more, apart for the student's samples and for reference answers."""
    for source, mask_N in (("sampled", sampled_N), ("reference", ~sampled_N)):
        means.add(f"{source}/loss", losses.loss_N, mask_N)
        means.add(f"{source}/reverse_kl", terms.kl.reverse_kl, mask_N)
        means.add(f"{source}/forward_kl", terms.kl.forward_kl, mask_N)
        means.add(f"{source}/gate_fraction", losses.gate_N, mask_N)
        means.add(f"{source}/teacher_entropy", terms.kl.teacher_entropy, mask_N)
        means.add(f"{source}/student_entropy", terms.kl.student_entropy, mask_N)


def add_by_position(
    means: Means,
    terms: TokenTerms | TopKTerms,
    positions_N: torch.Tensor,
    threshold: float | torch.Tensor,
) -> None:
    """Entropies in each part of the response, and how often they reach the threshold."""
    entropies = {"teacher": terms.kl.teacher_entropy, "student": terms.kl.student_entropy}
    parts_N = (positions_N * NUM_POSITIONS).long().clamp(max=NUM_POSITIONS - 1)
    for who, entropy_N in entropies.items():
        above_N = entropy_N >= threshold
        means.add(f"above/{who}", above_N)
        for part in range(NUM_POSITIONS):
            means.add(f"entropy_at/{who}/{part}", entropy_N, parts_N == part)
            means.add(f"above_at/{who}/{part}", above_N, parts_N == part)


def add_mismatch(means: Means, difference_N: torch.Tensor, sampled_N: torch.Tensor) -> None:
    """Of the tokens that an engine wrote; nan at the others."""
    means.keep("mismatch/logprob_abs", difference_N.abs(), LOGPROB_DIFFERENCE)
    difference_N = difference_N.abs().where(sampled_N, 0.0)
    means.add("mismatch/logprob_abs_mean", difference_N, sampled_N)
    means.add("mismatch/mult_prob_error", difference_N.exp(), sampled_N)


def columns_of(
    losses: TokenLosses,
    terms: TokenTerms | TopKTerms,
    difference_N: torch.Tensor | None,
    threshold: float | torch.Tensor,
) -> dict[str, torch.Tensor]:
    """By the names of tokens.record.SIGNALS, and τ, which moves from step to step.

    `difference_N`: from the engine, where it was measured.
    """
    if difference_N is None:
        difference_N = torch.full_like(losses.loss_N, torch.nan)
    return {
        "threshold": torch.zeros_like(losses.gate_N, dtype=torch.float64) + threshold,
        "loss": losses.loss_N,
        "gate": losses.gate_N,
        "student_logprob": terms.picked.sampled_student_logprobs,
        "teacher_logprob": terms.picked.sampled_teacher_logprobs,
        "engine_mismatch": difference_N,
        **terms.kl._asdict(),
    }


def add_of_teacher(
    means: Means, name: str, losses: TokenLosses, terms: TokenTerms | TopKTerms, own_N: torch.Tensor
) -> None:
    """Figures of one of several teachers, at its own tokens."""
    means.add(f"teacher/{name}/loss", losses.loss_N, own_N)
    means.add(f"teacher/{name}/reverse_kl", terms.kl.reverse_kl, own_N)
    means.add(f"teacher/{name}/forward_kl", terms.kl.forward_kl, own_N)
    means.add(f"teacher/{name}/entropy", terms.kl.teacher_entropy, own_N)
    means.add(f"teacher/{name}/gate_fraction", losses.gate_N, own_N)
