"""Options of the loss."""

from dataclasses import fields, replace
from typing import Literal

from pydantic import Field, model_validator

from megatron_eopd.config.section import Section
from megatron_eopd.objectives import FORWARD_KL, GATES, PRESETS, REVERSE_KL, Formula

READ_WITH = {
    "gate_width": ("gate", "sigmoid"),
    "gate_quantile": ("gate", "quantile"),
    "gate_max_overlap": ("gate", "disagreement"),
    "early_token_gain": ("token_weight", "early"),
    "entropy_weight_floor": ("entropy_weight", "confidence"),
    "entropy_weight_scale": ("entropy_weight", "confidence"),
}
"""Option → the one other option, and its value, with which it is read. Not the thresholds: whatever
the gate, metrics and recordings say which tokens are above them."""


class ObjectiveConfig(Section):
    name: Literal[*PRESETS] = "eopd"
    """Preset; docs/objectives.md has the formulas. `eopd`: reverse KL + α · 1[H ≥ τ] · forward KL,
    exact over the full vocabulary; `eopd_paper`: the same with the paper's sampled and top-k
    estimators; `eopd_mix`: (1 − λ) · reverse + λ · forward KL, λ = α · sigmoid((H − τ)/width);
    `opd`, `opd_sampled`, `vopd`: reverse KL only; `fkl`: forward KL only; `fixed_mix`: (1 − α) ·
    reverse + α · forward KL; `jsd`: generalised Jensen-Shannon; `skewed_kl`, `skewed_reverse_kl`:
    KL to a mixture of both models. The next five options replace single parts of it."""
    reverse_kl: Literal[*REVERSE_KL] | None = None
    """Estimator of KL(student ‖ teacher). `full`: exact; `sampled`: clipped surrogate on the
    sampled token; `vopd`: the same with a control variate; `topk`; `skewed`. Default: the
    preset's."""
    forward_kl: Literal[*FORWARD_KL] | None = None
    """Estimator of KL(teacher ‖ student), or `jsd` in its place. Default: the preset's."""
    gate: Literal[*GATES] | None = None
    """When forward KL joins. `hard`: H ≥ entropy_threshold; `sigmoid`: gradually around it;
    `quantile`: for the tokens of the step whose H is at or above its `gate_quantile`; `student`:
    where the student's own entropy reaches entropy_threshold; `disagreement`: where both models'
    top k overlap by no more than `gate_max_overlap`. Default: the preset's."""
    combine: Literal["add", "interpolate"] | None = None
    """`add`: reverse + α · gate · forward; `interpolate`: (1 − α · gate) · reverse + α · gate ·
    forward. Default: the preset's."""
    forward_kl_weight: float | None = Field(None, ge=0)
    """α, the weight of forward KL where the gate is open. Default: 0.5 for `fixed_mix`, else 1."""
    entropy_threshold: float = 0.8
    """τ: entropy, in nats, at or above which forward KL joins the loss; the teacher's, unless
    `gate=student`."""
    final_forward_kl_weight: float | None = Field(None, ge=0)
    """α at the end of the schedule. Default: α does not move."""
    final_entropy_threshold: float | None = None
    """τ at the end of the schedule. Default: τ does not move."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How α and τ go to their final values."""
    schedule_steps: int | None = Field(None, gt=0)
    """Optimizer steps until they are there. Default: all of the run."""
    gate_width: float = Field(0.1, gt=0)
    """Of the `sigmoid` gate, in nats: half a width from τ it is open to 38 % or 62 %."""
    gate_quantile: float = Field(0.8, ge=0, le=1)
    """Of the `quantile` gate: share of the tokens of an optimizer step that stay closed. Costs one
    more pass of the teacher's LM head."""
    gate_max_overlap: float = Field(0.5, ge=0, le=1)
    """Of the `disagreement` gate: largest share of the teacher's `top_k` most probable tokens that
    are among the student's. Costs one more pass over one model's logits."""
    reverse_kl_clip: float | None = Field(None, gt=0)
    """Largest value of the reverse KL term at a token, in nats; above it the term is constant and
    has no gradient. Default: none."""
    forward_kl_clip: float | None = Field(None, gt=0)
    """The same of the forward KL term."""
    clip_ratio: float = Field(0.2, gt=0, lt=1)
    """ε of the `sampled` and `vopd` estimators: ratios outside [1 − ε, 1 + ε] are clipped."""
    top_k: int = Field(16, gt=0)
    """Tokens in the support of `topk` estimators and of the topk/* metrics; of each model in the
    `disagreement` gate and the overlap/* metrics."""
    top_k_support: Literal["teacher", "student", "union"] = "teacher"
    """Whose most probable tokens the support has. Other than the teacher's costs one more pass over
    the student's logits."""
    top_k_normalization: Literal["teacher", "student", "both", "neither", "tail"] = "teacher"
    """Which side is renormalised on the support; `tail`: none, and one more entry has the rest."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """β of `jsd`: weight of the teacher in the mixture, and of KL(teacher ‖ mixture)."""
    skew: float = Field(0.1, gt=0, lt=1)
    """s of `skewed`: weight of the first model in KL(first ‖ s · first + (1 − s) · second)."""
    token_weight: Literal["uniform", "position", "early"] = "uniform"
    """By the place in the response. `position`: tokens weigh 0.25 at its start and about 1 from
    60 % of it on; `early`: from 1 + early_token_gain at its start evenly down to 1 at its end."""
    early_token_gain: float = Field(0.5, gt=0)
    """Of `token_weight=early`: how much more than the last token the first one weighs."""
    entropy_weight: Literal["uniform", "confidence"] = "uniform"
    """By the teacher's entropy H; multiplies `token_weight`. `confidence`: f + (1 − f) ·
    exp(−H / scale), so that tokens at which the teacher is unsure count less."""
    entropy_weight_floor: float = Field(0.25, gt=0, le=1)
    """f of `entropy_weight=confidence`: the least that a token weighs."""
    entropy_weight_scale: float = Field(1.0, gt=0)
    """scale of `entropy_weight=confidence`, in nats."""
    teacher_mixture: Literal["none", "divergences", "distributions"] = "none"
    """What becomes of several teachers. `none`: a prompt is scored by the one that its line names,
    else by [teacher]. Otherwise a line that names none, or `all`, is scored by every teacher:
    `divergences` minimises the sum over teachers of weight · loss; `distributions` the loss to the
    mean of their distributions by weight, times the sum of the weights."""
    max_trained_tokens: int | None = Field(None, gt=0)
    """Of each response only the first so many tokens are trained on and counted. What is behind
    them is neither scored nor seen by the student; `rollout.max_response_length` spares sampling
    it, too. Default: all of them."""
    ignored_token_ids: tuple[int, ...] = ()
    """Sampled tokens that have no loss. They still count as valid tokens in every mean."""
    student_temperature: float | None = Field(None, gt=0)
    """Divides the student's logits in the loss. Default: the rollout temperature."""
    teacher_temperature: float | None = Field(None, gt=0)
    """Divides the teacher's logits in the loss. Default: the rollout temperature."""
    head: Literal["materialized", "chunked"] = "materialized"
    """`chunked`: LM heads, loss and gradient go chunk by chunk of tokens, so that the logits of a
    microbatch never exist at once. Saves memory, not time."""
    head_chunk_size: int | None = Field(None, gt=0)
    """Tokens per chunk of the `chunked` head. Default: 4096 on GPU, 256 on CPU."""
    logits_dtype: Literal["model", "float32"] = "model"
    """Of both models' logits. `model`: rounded to the model's dtype, in bfloat16 to 8 bits, which
    moves entropies near the gate's threshold (docs/objectives.md, "Precision"). `float32`: the
    products of bfloat16 weights and hidden states are summed and kept in float32, at twice the
    bytes for logits; with `head=chunked` those of one chunk."""
    exclude_unshared_tokens: bool = False
    """Where one tokenizer has tokens that the other lacks, behind those that both have, as Qwen3's
    has four more than Qwen2.5's: leave them out of both softmaxes and of the student's samples.
    Without it such a pair is an error."""
    inplace_backward: bool = False
    """Write the gradient over the student's logits, which saves a tensor of their size. The
    `chunked` head does so anyway where it can."""

    @property
    def formula(self) -> Formula:
        """The preset's, with the parts that were set by their own option."""
        own = {part.name: getattr(self, part.name) for part in fields(Formula)}
        set_ones = {name: value for name, value in own.items() if value is not None}
        return replace(PRESETS[self.name], **set_ones)

    @model_validator(mode="after")
    def _formula_fits(self) -> "ObjectiveConfig":
        formula = self.formula
        weights = (formula.forward_kl_weight, self.final_forward_kl_weight or 0.0)
        if formula.combine == "interpolate" and max(weights) > 1:
            raise ValueError(
                f"forward_kl_weight={weights[0]} (final {self.final_forward_kl_weight}) with "
                f"combine=interpolate would give reverse KL the weight 1 − {max(weights)} < 0. Set "
                f"weights of at most 1, or combine=add."
            )
        if formula.reverse_kl == "none" and (
            formula.forward_kl == "none" or formula.gate == "never"
        ):
            raise ValueError(
                f"reverse_kl={formula.reverse_kl}, forward_kl={formula.forward_kl}, gate="
                f"{formula.gate} leave nothing to minimise. Set reverse_kl=full, or "
                f"forward_kl=full and gate=always."
            )
        if formula.forward_kl == "none" and formula.combine == "interpolate":
            raise ValueError(
                "combine=interpolate needs two terms, but forward_kl=none. Set combine=add."
            )
        for term in ("reverse_kl", "forward_kl"):
            clip = getattr(self, f"{term}_clip")
            if clip is not None and getattr(formula, term) == "none":
                raise ValueError(
                    f"{term}_clip={clip:g} would be ignored with {term}=none. Leave {term}_clip "
                    f"out, or set {term}=full."
                )
        if self.inplace_backward and formula.needs_second_sweep:
            raise ValueError(
                f"inplace_backward=true overwrites logits that reverse_kl={formula.reverse_kl} or "
                f"forward_kl={formula.forward_kl} reads once more. Set inplace_backward=false."
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "ObjectiveConfig":
        """Defaults are let through: the config.json of a run holds every option."""
        switches = {
            "gate": self.formula.gate,
            "token_weight": self.token_weight,
            "entropy_weight": self.entropy_weight,
        }
        for option, (switch, needed) in READ_WITH.items():
            value = getattr(self, option)
            is_asked = value != type(self).model_fields[option].default
            if is_asked and switches[switch] != needed:
                raise ValueError(
                    f"{option}={value:g} would be ignored with {switch}={switches[switch]}. Leave "
                    f"{option} out, or set {switch}={needed}."
                )
        return self
