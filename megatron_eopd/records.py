"""The typed records that flow through an iteration, each made by one stage and read by the next.

    prompts ─▶ Rollout ─▶ ScoredRollout ─▶ MicroBatch ─▶ StepReport

Every per-token array is aligned token for token: position t describes the token at t, predicted
from the tokens before t. So `response_logprobs[t]`, `teacher_hidden_TH[t]` and `target_ids_N[t]`
all speak of the same token, and no stage shifts anything by one.
"""
# Shapes: T response tokens of one rollout, H teacher hidden size, B sequences and S tokens of a
# padded microbatch, N valid response tokens of a microbatch.

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Prompt:
    """One line of the prompt set. Made by data.prompts, read by the engines and by evaluation."""

    index: int
    """Position in the prompt set; seeds the sampling, so the same prompt draws the same answers
    on every layout."""
    text: str
    answer: str
    """What a grader needs to judge a response; may be empty."""
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """One sampled response. Made by a RolloutEngine, identical on every rank."""

    prompt: Prompt
    sample_index: int
    """Which of the prompt's `samples_per_prompt` responses this is."""
    response_ids: tuple[int, ...]
    """Sampled token ids, the end-of-sequence token included when the model wrote it."""
    response_logprobs: tuple[float, ...]
    """The engine's own log-probability of each token, in nats, at the rollout temperature."""
    finish_reason: Literal["stop", "length"]
    weight_version: int
    """The student weights that wrote this response."""


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the teacher's signal. Made by the teacher, read by data.packing."""

    rollout: Rollout
    teacher_hidden_TH: torch.Tensor | None
    """The teacher's last hidden state from which each response token is predicted, in the
    teacher's dtype. Present on the ranks of the student's last pipeline stage, None elsewhere."""


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded sequences and the rows of them that enter the loss."""

    token_ids_BS: torch.Tensor
    prediction_rows_N: torch.Tensor
    """Rows of the hidden states, flattened from Megatron's [S, B, H] to [S·B, H], that predict a
    response token: the row *before* the token, so `row = (t - 1)·B + b`."""
    target_ids_N: torch.Tensor
    rollout_logprobs_N: torch.Tensor
    positions_N: torch.Tensor
    """Where in its response each token stands: 0 the first, 1 the last."""
    teacher_hidden_NH: torch.Tensor | None
    """As ScoredRollout.teacher_hidden_TH, concatenated over the sequences."""

    @property
    def num_valid_tokens(self) -> int:
        return self.target_ids_N.numel()


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, the same on every rank. Made by training.step."""

    grad_norm: float
    """Before clipping."""
    lr: float
    sums: dict[str, tuple[float, float]]
    """Metric name → (sum, count) over the valid tokens of all data-parallel ranks."""
    values: dict[str, list[float]]
    """Metric name → its value at each of those tokens, for percentiles and histograms."""
