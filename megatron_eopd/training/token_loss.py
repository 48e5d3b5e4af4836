"""The loss of a microbatch on the student's last stage. In: hidden states. Out: a sum over tokens.

Both LM heads see only the rows that predict a response token. With the chunked head the same
function of logits runs once per chunk of tokens instead of once per microbatch.
"""
# Shapes: S tokens of a microbatch on this rank, H hidden size, N valid response tokens of them, C
# of these in a chunk, V this rank's columns of the vocabulary.

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.distributed as dist

from megatron_eopd.config import Config
from megatron_eopd.losses.chunked_head import (
    chunk_size,
    chunked_head_loss,
    logits_dtype,
    overwrites_logits,
)
from megatron_eopd.losses.estimators import TokenSignals
from megatron_eopd.losses.objective import (
    Coefficients,
    TokenLosses,
    coefficients_at,
    token_objective,
    token_weights,
)
from megatron_eopd.losses.overlap import Overlap, top_k_overlap
from megatron_eopd.losses.teacher_mixture import mixed_logits
from megatron_eopd.losses.teacher_top_k import TopKTerms, top_k_terms
from megatron_eopd.losses.token_details import TokenDetails, details_of_logits, details_of_top_k
from megatron_eopd.losses.vocab_parallel import TokenTerms, vocab_parallel_terms
from megatron_eopd.losses.vocab_sum import Integrand, sum_over_vocab
from megatron_eopd.metrics.histogram import entropy_bins
from megatron_eopd.metrics.means import Means
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.objectives import GATES
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.quantile import spread_quantile
from megatron_eopd.parallel.vocab import vocab_parallel_logprobs
from megatron_eopd.records import ALL_TEACHERS, MicroBatch, teacher_name
from megatron_eopd.schedules import Progress
from megatron_eopd.teacher.heads import Heads, spoken_logits, teacher_logits, teacher_top_k
from megatron_eopd.tokens.notes import TokenNotes
from megatron_eopd.tokens.record import TOP
from megatron_eopd.training.diagnostics import add_diagnostics
from megatron_eopd.training.several_teachers import (
    own_tokens,
    pick,
    spread,
    weights_of_tokens,
)
from megatron_eopd.training.token_metrics import (
    add_by_position,
    add_by_source,
    add_ends,
    add_loss_metrics,
    add_mismatch,
    add_of_teacher,
    columns_of,
)

NON_FINITE = "non_finite"
"""The tally of tokens with non-finite logits, [R, 2] per tensor-parallel rank and model."""


@dataclass(frozen=True)
class StepSettings:
    """What one optimizer step asks of the loss."""

    coefficients: Coefficients
    compare_engine: bool
    """Also measure the engine's log-probabilities against the student's, which makes sense only
    while the student still has the weights that sampled the batch."""
    by_position: bool = False
    """Also measure entropies over the relative position in the response; for evaluations."""
    diagnose: bool = False
    """Also measure where student and teacher are apart; see training/diagnostics.py."""
    notes: TokenNotes | None = None
    """Where signals of some tokens are taken down."""


class TokenLoss:
    """From hidden states to the summed loss of a microbatch, in nats."""

    def __init__(
        self,
        model: CausalLM,
        teacher_heads: Heads,
        config: Config,
        vocab_size: int,
        context: ParallelContext,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """`stop_ids`: tokens that end a response, of which both models' opinion is measured."""
        self._model = model
        self._stop_ids = stop_ids
        self._teacher_heads = teacher_heads
        self._config = config
        self._vocab_size = vocab_size
        self._weights = {
            teacher_name(section): teacher.weight
            for section, teacher in config.all_teachers.items()
        }
        """Of each teacher."""
        self._entropy_bins = entropy_bins(vocab_size)
        self._groups = context.groups
        self._is_last_stage = context.layout.is_last_stage
        self._chunk_size = chunk_size(config.objective, context.device.type == "cuda")
        self._logits_dtype = logits_dtype(config.objective)

    def settings(
        self,
        microbatches: Sequence[MicroBatch],
        progress: Progress,
        compare_engine: bool = False,
        by_position: bool = False,
        diagnose: bool = False,
        notes: TokenNotes | None = None,
    ) -> StepSettings:
        """For the optimizer step that comes next. Collective over the data-parallel ranks of
        the last stage where the gate is a quantile of the step's entropies."""
        objective = self._config.objective
        coefficients = coefficients_at(objective, progress)
        if GATES[objective.formula.gate].needs_whole_step and self._is_last_stage:
            threshold = self._entropy_quantile(microbatches, objective.gate_quantile)
            coefficients = replace(coefficients, entropy_threshold=threshold)
        return StepSettings(coefficients, compare_engine, by_position, diagnose, notes)

    def __call__(
        self, batch: MicroBatch, hidden_S1H: torch.Tensor, means: Means, settings: StepSettings
    ) -> torch.Tensor:
        """The sum over tokens of the objective, float32 scalar; fills `means`."""
        hidden_NH = self._model.pick_rows(hidden_S1H, batch.prediction_rows_N)
        objective = self._config.objective
        loss_of_rows = partial(self._loss_of_rows, batch, means, settings)
        is_whole = objective.head == "materialized"
        if is_whole and self._logits_dtype is None:
            return loss_of_rows(self._model.lm_head(hidden_NH), slice(None))
        return chunked_head_loss(
            hidden_NH,
            self._model.lm_head_weight(),
            loss_of_rows,
            # Megatron's layer has no float32 logits: they are a single chunk's.
            chunk_size=max(len(hidden_NH), 1) if is_whole else self._chunk_size,
            tp_group=self._groups.tp,
            logits_dtype=self._logits_dtype,
        )

    def _loss_of_rows(
        self,
        batch: MicroBatch,
        means: Means,
        settings: StepSettings,
        logits_CV: torch.Tensor,
        rows: slice,
    ) -> torch.Tensor:
        if self._config.objective.teacher_mixture == "divergences":
            loss_C = self._loss_over_teachers(batch, means, settings, logits_CV, rows)
        else:
            loss_C = self._loss_of_tokens(batch, means, settings, logits_CV, rows)
        means.add("loss/total", loss_C.detach())
        return loss_C.sum()

    def _loss_over_teachers(
        self,
        batch: MicroBatch,
        means: Means,
        settings: StepSettings,
        logits_CV: torch.Tensor,
        rows: slice,
    ) -> torch.Tensor:
        """[C]: the sum over each token's teachers, with a sweep for each of them."""
        count = len(logits_CV)
        loss_C = torch.zeros(count, device=logits_CV.device)
        for name in self._weights:
            own = own_tokens(batch, rows, name)
            logits_MV = pick(logits_CV, own.runs)
            loss_M = self._loss_of_tokens(own.batch, means, settings, logits_MV, own.rows, name)
            loss_C = loss_C + spread(loss_M, own.runs, count)
            is_own_C = spread(torch.ones_like(loss_M), own.runs, count)
            means.add(f"teacher/{name}/token_share", is_own_C.detach())
        return loss_C

    def _loss_of_tokens(
        self,
        batch: MicroBatch,
        means: Means,
        settings: StepSettings,
        logits_CV: torch.Tensor,
        rows: slice,
        teacher: str | None = None,
    ) -> torch.Tensor:
        """[C], by what its teachers say of each token; `teacher`: where it is this one alone."""
        objective = self._config.objective
        target_ids_C = batch.target_ids_N[rows]
        rollout_logprobs_C = batch.rollout_logprobs_N[rows]
        signals, terms, details = self._signals(batch, logits_CV, rows, rollout_logprobs_C)
        positions_C = batch.positions_N[rows]
        weight_C = token_weights(positions_C, target_ids_C, signals.kl.teacher_entropy, objective)
        losses = token_objective(signals, objective, settings.coefficients, weight_C)
        losses = losses._replace(loss_N=losses.loss_N * self._weight(batch, rows, losses.gate_N))
        with torch.no_grad():
            means.tally(NON_FINITE, terms.non_finite_R2)
            add_loss_metrics(means, losses, terms, target_ids_C, self._entropy_bins)
            if teacher is not None:
                add_of_teacher(means, teacher, losses, terms, torch.ones_like(losses.gate_N) > 0)
            elif len(self._weights) > 1:
                self._add_by_teacher(means, losses, terms, batch, rows)
            add_ends(means, terms, target_ids_C, self._stop_ids)
            if self._config.rollout.uses_references:
                add_by_source(means, losses, terms, batch.sampled_N[rows])
            if GATES[objective.formula.gate].has_threshold:
                # float64: 0.8 in float32 is 0.800000012.
                zeros_C = torch.zeros_like(losses.gate_N, dtype=torch.float64)
                means.add("gate/threshold", zeros_C + settings.coefficients.entropy_threshold)
            if settings.by_position:
                threshold = settings.coefficients.entropy_threshold
                add_by_position(means, terms, positions_C, threshold)
            if settings.diagnose:
                add_diagnostics(means, terms.kl, signals.overlap(), positions_C)
            difference_C = None
            if settings.compare_engine:
                logprobs_C = self._engine_view(terms, logits_CV, target_ids_C)
                # nan marks what no engine wrote: to pick rows by a mask would wait for the device.
                difference_C = (logprobs_C - rollout_logprobs_C).where(
                    batch.sampled_N[rows], torch.nan
                )
                add_mismatch(means, difference_C, batch.sampled_N[rows])
            if settings.notes is not None:
                threshold = settings.coefficients.entropy_threshold
                columns = columns_of(losses, terms, difference_C, threshold)
                # Of several teachers of a response the first one is taken down.
                first = next(iter(self._weights))
                settings.notes.take(
                    batch,
                    rows,
                    columns,
                    details,
                    lambda r: teacher in (None, first) or r.prompt.teacher != ALL_TEACHERS,
                )
        return losses.loss_N

    def _weight(self, batch: MicroBatch, rows: slice, like_C: torch.Tensor) -> torch.Tensor | float:
        """Of each token, by its teachers."""
        mixes = self._config.objective.teacher_mixture == "distributions"
        if not mixes and set(self._weights.values()) == {1.0}:
            return 1.0
        return weights_of_tokens(batch.teacher, rows, self._weights, like_C)

    def _add_by_teacher(
        self,
        means: Means,
        losses: TokenLosses,
        terms: TokenTerms | TopKTerms,
        batch: MicroBatch,
        rows: slice,
    ) -> None:
        """Of each teacher. Where distributions are mixed, divergences and entropy are no single
        one's."""
        for name in self._weights:
            parts = [part for part in batch.teacher if part.teacher == name]
            own_C = weights_of_tokens(parts, rows, {name: 1.0}, losses.gate_N) > 0
            means.add(f"teacher/{name}/token_share", own_C)
            if self._config.objective.teacher_mixture == "none":
                add_of_teacher(means, name, losses, terms, own_C)

    def _signals(
        self,
        batch: MicroBatch,
        logits_CV: torch.Tensor,
        rows: slice,
        rollout_logprobs_C: torch.Tensor,
    ) -> tuple[TokenSignals, TokenTerms | TopKTerms, Callable[[slice], TokenDetails]]:
        """What estimators may use of these tokens, from whatever the teachers hand over; and what
        people may ask of some of them."""
        objective = self._config.objective
        target_ids_C = batch.target_ids_N[rows]
        if self._config.teacher.payload == "topk":
            teacher = teacher_top_k(batch.teacher, rows, objective.top_k, logits_CV.device)
            top_k = top_k_terms(
                logits_CV,
                teacher,
                tp_group=self._groups.tp,
                vocab_size=self._vocab_size,
                student_temperature=self._config.student_temperature,
                sampled_ids=target_ids_C,
                inplace_backward=overwrites_logits(objective),
            )
            overlap = self._overlap(top_k, logits_CV)
            signals = TokenSignals(top_k.kl, top_k.picked, rollout_logprobs_C, _refused, overlap)
            details = partial(details_of_top_k, logits_CV, teacher, top_k, target_ids_C, top_k=TOP)
            return signals, top_k, details
        # Without a token there is no teacher, and any logits will do.
        teacher_logits_CV = logits_CV.detach()
        if batch.teacher:
            teacher_logits_CV = self._teacher_logits(batch, rows)
        terms = self._terms(
            logits_CV,
            teacher_logits_CV,
            sampled_ids=target_ids_C,
            top_k=objective.top_k,
            top_k_of=objective.top_k_support,
            inplace_backward=overwrites_logits(objective),
        )

        def over_vocab(integrand: Integrand) -> torch.Tensor:
            return sum_over_vocab(integrand, logits_CV, teacher_logits_CV, terms)

        # The sweep has listed the top k of one model; the other's logits have theirs.
        unlisted_CV = teacher_logits_CV if objective.top_k_support == "student" else logits_CV
        overlap = self._overlap(terms, unlisted_CV)
        signals = TokenSignals(terms.kl, terms.picked, rollout_logprobs_C, over_vocab, overlap)
        details = partial(
            details_of_logits,
            logits_CV,
            teacher_logits_CV,
            terms,
            target_ids_C,
            top_k=TOP,
            swept_top_k=0 if objective.top_k_support == "student" else objective.top_k,
        )
        return signals, terms, details

    def _teacher_logits(self, batch: MicroBatch, rows: slice) -> torch.Tensor:
        """[C, V]; where distributions are mixed, logits of the mixture."""
        parts, heads, dtype = batch.teacher, self._teacher_heads, self._logits_dtype
        if self._config.objective.teacher_mixture != "distributions":
            return teacher_logits(parts, rows, heads, dtype)
        spoken = spoken_logits(parts, rows, heads, self._weights, dtype)
        if not spoken:  # of no tokens
            return teacher_logits(parts, rows, heads, torch.float32)
        width = spoken[0].logits_MV.shape[-1]
        before = dist.get_rank(self._groups.tp) * width
        return mixed_logits(
            spoken,
            len(range(*rows.indices(batch.num_valid_tokens))),
            num_columns=min(max(self._vocab_size - before, 0), width),
            temperature=self._config.teacher_temperature,
            tp_group=self._groups.tp,
        )

    def _terms(self, logits: torch.Tensor, teacher_logits: torch.Tensor, **asked) -> TokenTerms:
        return vocab_parallel_terms(
            logits,
            teacher_logits,
            tp_group=self._groups.tp,
            vocab_size=self._vocab_size,
            student_temperature=self._config.student_temperature,
            teacher_temperature=self._config.teacher_temperature,
            **asked,
        )

    def _overlap(
        self, terms: TokenTerms | TopKTerms, unlisted_CV: torch.Tensor
    ) -> Callable[[], Overlap]:
        """Found once, when somebody asks. `unlisted_CV`: logits of the model whose top k are not
        the first ones of `terms.picked`."""
        top_k = min(self._config.objective.top_k, self._vocab_size)
        return cache(partial(top_k_overlap, terms.picked, unlisted_CV, top_k, terms.vocabulary))

    def _engine_view(
        self, terms: TokenTerms | TopKTerms, logits_CV: torch.Tensor, target_ids_C: torch.Tensor
    ) -> torch.Tensor:
        """The student's log-probabilities of the sampled tokens at the engine's temperature."""
        temperature = self._config.rollout.temperature
        if temperature == self._config.student_temperature:
            return terms.picked.sampled_student_logprobs
        return vocab_parallel_logprobs(
            logits_CV,
            target_ids_C,
            tp_group=self._groups.tp,
            vocab_size=self._vocab_size,
            temperature=temperature,
        )

    @torch.no_grad()
    def _entropy_quantile(
        self, microbatches: Sequence[MicroBatch], fraction: float
    ) -> torch.Tensor:
        """Of the teacher's entropy, over the tokens of all microbatches and of all data- and
        context-parallel ranks."""
        own = [x for batch in microbatches for x in self._entropies(batch)]
        none = microbatches[0].rollout_logprobs_N[:0]
        return spread_quantile(torch.cat([none, *own]), fraction, self._groups.dp_cp)

    def _entropies(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """Chunk by chunk."""
        if self._config.teacher.payload == "topk":
            k, device = self._config.objective.top_k, batch.target_ids_N.device
            yield teacher_top_k(batch.teacher, slice(None), k, device).entropy_N
            return
        for first in range(0, batch.num_valid_tokens, self._chunk_size):
            rows = slice(first, first + self._chunk_size)
            logits_CV = self._teacher_logits(batch, rows)
            yield self._terms(logits_CV, logits_CV).kl.teacher_entropy


def _refused(integrand: Integrand) -> torch.Tensor:
    raise AssertionError("config/checks.py refuses sums over the vocabulary for payload=topk")
