"""The formulas, on a whole vocabulary, as they are written on paper: the oracle of the tests.

Argument order, everywhere: reverse KL is KL(student ‖ teacher), forward KL KL(teacher ‖ student).
"""
# Shapes: V vocabulary, "..." any leading dims (tokens).

from typing import NamedTuple

import torch


class KLTerms(NamedTuple):
    """Per-token terms in nats, float32, shaped like the logits without their last dim."""

    reverse_kl: torch.Tensor
    forward_kl: torch.Tensor
    teacher_entropy: torch.Tensor
    student_entropy: torch.Tensor


def dense_kl_terms(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> KLTerms:
    """All four terms over the full vocabulary, in the dtype of the logits.

    Differentiable by autograd; the teacher is treated as a constant. Columns must be real tokens.
    """
    student = (student_logits / student_temperature).log_softmax(-1)
    teacher = (teacher_logits / teacher_temperature).log_softmax(-1).detach()
    return KLTerms(
        reverse_kl=(student.exp() * (student - teacher)).sum(-1),
        forward_kl=(teacher.exp() * (teacher - student)).sum(-1),
        teacher_entropy=-(teacher.exp() * teacher).sum(-1),
        student_entropy=-(student.exp() * student).sum(-1),
    )
