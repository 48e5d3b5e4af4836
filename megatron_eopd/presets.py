"""The named objectives: which parts each one is made of. Pure data, read by config and losses."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """The fields are options of the same names; losses/estimators.py has what they stand for."""

    reverse_kl: str
    forward_kl: str
    gate: str
    combine: str = "add"
    forward_kl_weight: float = 1.0

    @property
    def needs_sampled_tokens(self) -> bool:
        """Whether it reads the engine's log-probability of a token that the student drew."""
        return self.reverse_kl in ("sampled", "vopd")

    @property
    def is_gated(self) -> bool:
        """Whether tokens are told apart by the teacher's entropy."""
        return self.gate in ("hard", "sigmoid", "quantile")

    @property
    def reads_logits_again(self) -> bool:
        """Whether a term sweeps the logits once more, after the sweep that all objectives share."""
        return self.reverse_kl == "skewed" or self.forward_kl in ("skewed", "jsd")


PRESETS = {
    "eopd": Parts("full", "full", "hard"),
    "eopd_paper": Parts("sampled", "topk", "hard"),
    "eopd_mix": Parts("full", "full", "sigmoid", "interpolate"),
    "opd": Parts("full", "none", "never"),
    "opd_sampled": Parts("sampled", "none", "never"),
    "vopd": Parts("vopd", "none", "never"),
    "fkl": Parts("none", "full", "always"),
    "fixed_mix": Parts("full", "full", "always", "interpolate", 0.5),
    "jsd": Parts("none", "jsd", "always"),
    "skewed_kl": Parts("none", "skewed", "always"),
    "skewed_reverse_kl": Parts("skewed", "none", "never"),
}
