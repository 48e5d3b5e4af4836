"""What an objective can be made of: a row for each estimator and gate, and the named presets.

Pure data without torch, so that --help answers at once. losses/estimators.py has the functions,
docs/objectives.md the formulas. A new divergence is a function there and a row here.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimator:
    function: str
    """Its name in losses/estimators.py."""
    needs_whole_distribution: bool = True
    """Of the teacher, over the full vocabulary: then `teacher.payload=topk` is not enough."""
    needs_second_sweep: bool = False
    """It goes through the logits once more, after the sweep that all objectives share: they must
    then not be overwritten by the gradient."""
    needs_sampled_tokens: bool = False
    """It reads the engine's log-probability of a token that the student drew: reference answers
    have none, and the student's temperature must be the engine's."""


REVERSE_KL: dict[str, Estimator | None] = {
    "full": Estimator("full_reverse_kl"),
    "sampled": Estimator(
        "sampled_reverse_kl", needs_whole_distribution=False, needs_sampled_tokens=True
    ),
    "vopd": Estimator("vopd_reverse_kl", needs_sampled_tokens=True),
    "topk": Estimator("top_k_reverse_kl", needs_whole_distribution=False),
    "skewed": Estimator("skewed_reverse_kl", needs_second_sweep=True),
    "none": None,
}
FORWARD_KL: dict[str, Estimator | None] = {
    "full": Estimator("full_forward_kl"),
    "topk": Estimator("top_k_forward_kl", needs_whole_distribution=False),
    "skewed": Estimator("skewed_forward_kl", needs_second_sweep=True),
    "jsd": Estimator("jensen_shannon", needs_second_sweep=True),
    "none": None,
}


@dataclass(frozen=True)
class Gate:
    function: str
    """Its name in losses/estimators.py."""
    reads_entropy: bool = True
    """Whether it tells tokens apart by the teacher's entropy."""
    has_threshold: bool = True
    """Whether it compares an entropy with τ."""
    needs_whole_step: bool = False
    """Its threshold comes from all tokens of an optimizer step."""


GATES = {
    "hard": Gate("hard_gate"),
    "sigmoid": Gate("sigmoid_gate"),
    "quantile": Gate("hard_gate", needs_whole_step=True),
    "student": Gate("student_gate", reads_entropy=False),
    "disagreement": Gate("disagreement_gate", reads_entropy=False, has_threshold=False),
    "always": Gate("open_gate", reads_entropy=False, has_threshold=False),
    "never": Gate("closed_gate", reads_entropy=False, has_threshold=False),
}


@dataclass(frozen=True)
class Formula:
    """The fields are options of the same names."""

    reverse_kl: str
    forward_kl: str
    gate: str
    combine: str = "add"
    forward_kl_weight: float = 1.0

    @property
    def estimators(self) -> list[Estimator]:
        rows = (REVERSE_KL[self.reverse_kl], FORWARD_KL[self.forward_kl])
        return [row for row in rows if row is not None]

    @property
    def needs_sampled_tokens(self) -> bool:
        return any(row.needs_sampled_tokens for row in self.estimators)

    @property
    def needs_second_sweep(self) -> bool:
        return any(row.needs_second_sweep for row in self.estimators)


PRESETS = {
    "eopd": Formula("full", "full", "hard"),
    "eopd_paper": Formula("sampled", "topk", "hard"),
    "eopd_mix": Formula("full", "full", "sigmoid", "interpolate"),
    "opd": Formula("full", "none", "never"),
    "opd_sampled": Formula("sampled", "none", "never"),
    "vopd": Formula("vopd", "none", "never"),
    "fkl": Formula("none", "full", "always"),
    "fixed_mix": Formula("full", "full", "always", "interpolate", 0.5),
    "jsd": Formula("none", "jsd", "always"),
    "skewed_kl": Formula("none", "skewed", "always"),
    "skewed_reverse_kl": Formula("skewed", "none", "never"),
}


def fits_top_k(table: Mapping[str, Estimator | None]) -> list[str]:
    """Estimators of a table for which the teacher's top k are enough."""
    return [name for name, row in table.items() if row is None or not row.needs_whole_distribution]
