"""One optimizer step. In: MicroBatches. Out: StepReport, the same on every rank.

Loss and gradient are sums over tokens, divided by the number of valid tokens of all microbatches
and data-parallel ranks: how tokens were packed never changes a step.
"""
# Shapes: S tokens, B sequences, H hidden size, N valid response tokens of a microbatch.

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from megatron_eopd.config import Config
from megatron_eopd.losses import KLTerms, token_objective, vocab_parallel_kl_terms
from megatron_eopd.metrics import Means, Sums
from megatron_eopd.models.build import CausalLM
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.vocab import vocab_parallel_logprobs
from megatron_eopd.records import MicroBatch, StepReport
from megatron_eopd.training.forward import hidden_states, map_hidden, run_schedule
from megatron_eopd.training.optimizer import Trainable

TeacherHead = Callable[[torch.Tensor], torch.Tensor]
"""Teacher hidden states [N, H] → vocab-parallel logits [N, V] with the student's vocabulary cut."""


class NonFiniteError(RuntimeError):
    """Loss or gradient is NaN or infinite. Raised on every rank, before the weights change."""


class TokenLoss:
    """From hidden states to the summed loss of a microbatch, on the student's last stage."""

    def __init__(
        self,
        model: CausalLM,
        teacher_head: TeacherHead,
        config: Config,
        vocab_size: int,
        context: ParallelContext,
    ) -> None:
        self._model = model
        self._teacher_head = teacher_head
        self._config = config
        self._vocab_size = vocab_size
        self._tp_group = context.groups.tp

    def __call__(
        self, batch: MicroBatch, hidden_SBH: torch.Tensor, means: Means, compare_engine: bool
    ) -> torch.Tensor:
        """The sum over tokens of the objective, in nats, float32 scalar; fills `means`.

        `compare_engine`: also measure the engine's log-probabilities against the student's, which
        makes sense only while the student still has the weights that sampled the batch.
        """
        hidden_NH = self._model.pick_rows(hidden_SBH, batch.prediction_rows_N)
        logits_NV = self._model.lm_head(hidden_NH)
        terms = vocab_parallel_kl_terms(
            logits_NV,
            self._teacher_head(batch.teacher_hidden_NH),
            tp_group=self._tp_group,
            vocab_size=self._vocab_size,
            student_temperature=self._config.student_temperature,
            teacher_temperature=self._config.teacher_temperature,
        )
        loss_N, gate_N = token_objective(terms, self._config.objective)
        with torch.no_grad():
            _add_loss_metrics(means, loss_N, gate_N, terms)
            if compare_engine:
                self._add_mismatch(means, logits_NV, batch)
        return loss_N.sum()

    def _add_mismatch(self, means: Means, logits_NV: torch.Tensor, batch: MicroBatch) -> None:
        logprobs_N = vocab_parallel_logprobs(
            logits_NV,
            batch.target_ids_N,
            tp_group=self._tp_group,
            vocab_size=self._vocab_size,
            temperature=self._config.rollout.temperature,
        )
        difference_N = (logprobs_N - batch.rollout_logprobs_N).abs()
        means.add("mismatch/logprob_abs_mean", difference_N)
        means.add("mismatch/mult_prob_error", difference_N.exp())
        means.keep("mismatch/logprob_abs", difference_N)


def _add_loss_metrics(
    means: Means, loss_N: torch.Tensor, gate_N: torch.Tensor, terms: KLTerms
) -> None:
    gated_N, ungated_N = gate_N > 0, gate_N == 0
    means.add("loss/total", loss_N)
    for name, values_N in (("reverse_kl", terms.reverse_kl), ("forward_kl", terms.forward_kl)):
        means.add(f"loss/{name}", values_N)
        means.add(f"loss/{name}_gated", values_N, gated_N)
        means.add(f"loss/{name}_ungated", values_N, ungated_N)
    means.add("gate/fraction", gate_N)
    means.add("entropy/teacher_mean", terms.teacher_entropy)
    means.add("entropy/student_mean", terms.student_entropy)
    means.add("entropy/student_gated", terms.student_entropy, gated_N)
    means.keep("entropy/teacher", terms.teacher_entropy)
    means.keep("entropy/student", terms.student_entropy)


def train_step(
    student: Trainable,
    token_loss: TokenLoss,
    microbatches: Sequence[MicroBatch],
    context: ParallelContext,
    *,
    compare_engine: bool = False,
) -> StepReport:
    """Forward, backward, clip, step, over this rank's microbatches.

    Raises:
        NonFiniteError: on every rank, with the weights as they were before the step.
    """
    means = Means()
    student.wrapped.zero_grad_buffer()
    student.optimizer.zero_grad()

    def forward_step(batches, model):
        batch = next(batches)
        return hidden_states(model, batch.token_ids_BS), partial(loss_of, batch)

    def loss_of(batch: MicroBatch, hidden_SBH: torch.Tensor):
        loss = token_loss(batch, hidden_SBH, means, compare_engine)
        # Megatron sums loss and count over microbatches and ranks, and divides once.
        count = torch.tensor(batch.num_valid_tokens, dtype=torch.int, device=loss.device)
        return loss, count, {}

    run_schedule(forward_step, student.wrapped, microbatches, context, forward_only=False)
    lr = student.lr
    report_parts = share_from_last_stage(means, context)
    _refuse_non_finite(student, report_parts[0]["loss/total"][0], context)
    _, grad_norm, _ = student.optimizer.step()
    student.scheduler.step(increment=1)
    return StepReport(float(grad_norm), lr, *report_parts)


@torch.no_grad()
def measure(
    token_loss: TokenLoss,
    model: CausalLM,
    microbatches: Sequence[MicroBatch],
    context: ParallelContext,
) -> tuple[Sums, dict[str, list[float]]]:
    """The loss metrics of the batch without a step, on every rank."""
    means = Means()

    def at_last_stage(batch: MicroBatch, hidden_SBH: torch.Tensor) -> None:
        token_loss(batch, hidden_SBH, means, compare_engine=False)

    map_hidden(model, microbatches, at_last_stage, context)
    return share_from_last_stage(means, context)


def share_from_last_stage(
    means: Means, context: ParallelContext
) -> tuple[Sums, dict[str, list[float]]]:
    """Sums and values over the data-parallel ranks of the last stage, told to every rank."""
    layout = context.layout
    told: list = [None]
    if layout.is_last_stage:
        told = [means.reduce(context.groups.dp)]
    dist.broadcast_object_list(told, src=layout.last_stage_leader, group=context.cpu_group)
    return told[0]


def _refuse_non_finite(student: Trainable, loss: float, context: ParallelContext) -> None:
    """One number per rank decides for all: NaN and infinity survive a sum."""
    total = torch.stack([b.grad_data.sum() for b in student.wrapped.buffers]).sum().double()
    # cpu_group, whatever the device: all ranks, also those of other stages, must decide alike.
    total = total.cpu()
    dist.all_reduce(total, group=context.cpu_group)
    if not (math.isfinite(loss) and math.isfinite(total.item())):
        raise NonFiniteError(
            f"loss={loss}, sum of gradients={total.item()}: not finite. The weights were not "
            f"changed. Look at the rollouts of this iteration, lower training.lr or "
            f"training.clip_grad, or start again from an earlier checkpoint."
        )
