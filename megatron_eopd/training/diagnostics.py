"""Where student and teacher are apart: overlap of their top k, entropies and divergences; over all
tokens, over the response, and by the teacher's entropy. In: signals of tokens. Out: means.
"""
# Shapes: N valid response tokens.

from itertools import pairwise

import torch

from megatron_eopd.losses.divergences import KLTerms
from megatron_eopd.losses.overlap import Overlap
from megatron_eopd.metrics.means import Means
from megatron_eopd.metrics.names import ENTROPY_EDGES, NUM_QUARTERS


@torch.no_grad()
def add_diagnostics(means: Means, kl: KLTerms, overlap: Overlap, positions_N: torch.Tensor) -> None:
    """The same names whatever the tokens. `positions_N`: 0 a response's first token, 1 its last."""
    own = {
        "overlap": overlap.share,
        "teacher_mass": overlap.teacher_mass,
        "student_mass": overlap.student_mass,
        "entropy_gap": kl.teacher_entropy - kl.student_entropy,
    }
    means.add("overlap/top_k", own["overlap"])
    means.add("overlap/teacher_mass", own["teacher_mass"])
    means.add("overlap/student_mass", own["student_mass"])
    means.add("entropy/gap", own["entropy_gap"])
    figures = own | {"reverse_kl": kl.reverse_kl, "forward_kl": kl.forward_kl}
    quarters_N = (positions_N * NUM_QUARTERS).long().clamp(max=NUM_QUARTERS - 1)
    for n in range(NUM_QUARTERS):
        _add_part(means, f"by_position/{n + 1}", figures, quarters_N == n)
    # One by one: a tensor of the edges would be copied to the device, which waits for it.
    edges = pairwise((-torch.inf, *ENTROPY_EDGES, torch.inf))
    for n, (low, high) in enumerate(edges, start=1):
        inside_N = (kl.teacher_entropy >= low) & (kl.teacher_entropy < high)
        means.add(f"by_entropy/{n}/tokens", inside_N.float())
        _add_part(means, f"by_entropy/{n}", figures, inside_N)


def _add_part(
    means: Means, folder: str, figures: dict[str, torch.Tensor], inside_N: torch.Tensor
) -> None:
    for name, values_N in figures.items():
        means.add(f"{folder}/{name}", values_N, inside_N)
