"""The typed records that flow through an iteration, each made by one stage and read by the next.

    prompts ─▶ Rollout ─▶ ScoredRollout ─▶ MicroBatch ─▶ StepReport

Every per-token array is aligned token for token: position t describes the token at t, predicted
from the tokens before t. So `response_logprobs[t]`, `hidden_NH[t]` and `target_ids_N[t]`
all speak of the same token, and no stage shifts anything by one.
"""
# Shapes: S tokens of a microbatch on this rank, N valid response tokens of them, M those of one
# teacher, H teacher hidden size, V this rank's columns of the vocabulary, K a teacher's top tokens.
# Of packed sequences: B sequences, L longest of them, Q longest part of a sequence on this rank, R
# context-parallel ranks, F frequencies (half a head dim).

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

try:
    from megatron.core.packed_seq_params import PackedSeqParams
except ImportError:  # the loss and its kernels run without Megatron-Core, and pack nothing
    PackedSeqParams = object

LOWEST = -1e30
"""Stands for −inf in logits and log-probabilities: exp of it is 0, and sums and products with it
are finite."""

DEFAULT_TEACHER = "teacher"
"""The one of the section `[teacher]`; the others have the names of `[teachers.NAME]`."""

ALL_TEACHERS = "all"
"""In the place of a teacher's name: every one scores the same tokens."""


def teacher_name(section: str) -> str:
    """As prompts name the teacher of a section."""
    return section.removeprefix("teachers.") if section != "teacher" else DEFAULT_TEACHER


class Turn(NamedTuple):
    """One message of a chat."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


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
    teacher: str = DEFAULT_TEACHER
    """Which teacher scores its responses, or ALL_TEACHERS."""
    context: tuple[Turn, ...] = ()
    """The turns of a chat before `text`, a system turn among them."""
    teacher_ids: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """Teacher → what it reads in the place of `prompt_ids`, where that is something else."""

    def is_scored_by(self, teacher: str) -> bool:
        return self.teacher in (teacher, ALL_TEACHERS)

    def ids_for(self, teacher: str) -> tuple[int, ...]:
        """The prompt as this teacher reads it."""
        return self.teacher_ids.get(teacher, self.prompt_ids)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The whole chat, the question last."""
        return (*self.context, Turn("user", self.text))


@dataclass(frozen=True)
class Rollout:
    """One response to a prompt: sampled by a RolloutEngine, or a reference answer that somebody
    else wrote. Identical on every rank."""

    prompt: Prompt
    sample_index: int
    """Which of the prompt's `samples_per_prompt` responses this is."""
    response_ids: tuple[int, ...]
    """Token ids, the end-of-sequence token included when the model wrote it."""
    response_logprobs: tuple[float, ...]
    """The engine's own log-probability of each token, in nats, at the rollout temperature; 0 for
    the tokens of a reference, which no engine wrote."""
    finish_reason: Literal["stop", "length"]
    weight_version: int
    """The student weights that wrote this response, or would have."""
    source: Literal["sampled", "reference"] = "sampled"
    num_cut: int = 0
    """Tokens of the whole response behind these, which nobody trains on."""

    @property
    def whole_length(self) -> int:
        """Tokens of the response, with those."""
        return len(self.response_ids) + self.num_cut

    def first_tokens(self, count: int | None) -> "Rollout":
        """Its first so many tokens; None: all."""
        if count is None or len(self.response_ids) <= count:
            return self
        return replace(
            self,
            response_ids=self.response_ids[:count],
            response_logprobs=self.response_logprobs[:count],
            num_cut=self.whole_length - count,
        )

    def read_by(self, teacher: str) -> "Rollout":
        """The same response behind the prompt that this teacher reads."""
        own = self.prompt.teacher_ids.get(teacher)
        if own is None:
            return self
        return replace(self, prompt=replace(self.prompt, prompt_ids=own))


class HiddenStates(NamedTuple):
    """The teacher's last hidden states, from which each token is predicted."""

    hidden_NH: torch.Tensor
    """In the teacher's dtype."""


class Logits(NamedTuple):
    """The teacher's logits, with the student's cut of the vocabulary."""

    logits_NV: torch.Tensor
    """This tensor-parallel rank's columns, in the teacher's dtype."""


class TeacherTopK(NamedTuple):
    """What the teacher hands over: one row per token, plain tensors, without gradient.

    Exact over the teacher's full vocabulary, in nats, at its temperature. Every row of finite
    logits is finite: LOWEST stands for the logarithm of 0.
    """

    ids_NK: torch.Tensor
    """int64, the most probable token first, equal ones by id; 0 where invalid."""
    logprobs_NK: torch.Tensor
    """float32. LOWEST exactly where invalid: the teacher can write fewer than k tokens."""
    entropy_N: torch.Tensor
    """float32; NaN where the teacher's logits were not finite."""
    tail_logmass_N: torch.Tensor
    """float32, log of the mass outside the top k; LOWEST where there is none."""
    sampled_logprobs_N: torch.Tensor
    """float32, log p of the sampled token, inside the top k or not; of the order of LOWEST where
    the teacher cannot write it."""

    @property
    def valid_NK(self) -> torch.Tensor:
        """bool: where ids_NK names a token."""
        return self.logprobs_NK > LOWEST


Payload = HiddenStates | Logits | TeacherTopK
"""What a teacher says of N tokens: tensors with one row for each."""


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's word on one rollout, for the response tokens that this rank has a row for."""

    teacher: str
    """Its name among the teachers of the run."""
    payload: Payload

    @property
    def num_tokens(self) -> int:
        return len(self.payload[0])


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its teachers' signals. Made by the teachers, read by data.packing."""

    rollout: Rollout
    signals: tuple[TeacherSignal, ...] = ()
    """Of each teacher that scores it, on the ranks of the student's last pipeline stage; none
    elsewhere."""


class TeacherPart(NamedTuple):
    """What one teacher says of its tokens of a microbatch."""

    teacher: str
    runs: tuple[range, ...]
    """Which of the N tokens its M are, rising. On the host: whoever picks some of them must not
    wait for the device."""
    payload: Payload


class Unpacking(NamedTuple):
    """The indices by which attention on padded sequences takes the row apart and joins it again."""

    query_rows_BQ: torch.Tensor
    """Row of each of this rank's tokens, by sequence; any row where a sequence has none."""
    query_positions_BQ: torch.Tensor
    key_rows_BL: torch.Tensor
    """The same for all tokens, as rows of the ranks' rows behind one another, [R · S]."""
    slots_S: torch.Tensor
    """Where each of this rank's tokens is in a flattened [B · Q]."""


class Rotation(NamedTuple):
    """Of rotary embeddings, for each token of a row, in the model's dtype."""

    cos_S1F: torch.Tensor
    sin_S1F: torch.Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description, and what our own attention needs beside it."""

    lengths: tuple[int, ...] = ()
    """Of the whole sequences, before context parallelism cuts them."""
    positions_S: torch.Tensor | None = None
    """Of each of this rank's tokens in its sequence."""
    rotation: Rotation | None = None
    """Made by the model, from the positions and its own frequencies."""
    unpacking: Unpacking | None = None
    """Made by the model where its attention works on padded sequences."""


class ResponseTokens(NamedTuple):
    """Tokens of one response, in rising order."""

    rollout: Rollout
    tokens: Sequence[int]
    """Their places in the response; under context parallelism not all of them."""


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences and the rows of them that enter the loss; under context parallelism those
    of one rank."""

    token_ids_1S: torch.Tensor
    sequences: PackedSequences
    prediction_rows_N: torch.Tensor
    """Rows of the hidden states that predict a response token: each the row *before* it."""
    target_ids_N: torch.Tensor
    rollout_logprobs_N: torch.Tensor
    sampled_N: torch.Tensor
    """bool: whether the student wrote the token. Only then is there a log-probability of it."""
    positions_N: torch.Tensor
    """Where in its response each token stands: 0 the first, 1 the last."""
    responses: tuple[ResponseTokens, ...]
    """Whose tokens the N are, in order. On the host."""
    teacher: tuple[TeacherPart, ...]
    """A part for each teacher; together they speak of all N tokens, and several of the same ones
    where a prompt is scored by all of them. Empty where ScoredRollout has no signal."""

    @property
    def num_valid_tokens(self) -> int:
        return self.target_ids_N.numel()


@dataclass(frozen=True)
class StepFault:
    """Why an optimizer step was not taken, or must not be kept; the same on every rank."""

    kind: Literal["gradient", "weights", "spike"]
    """Loss or gradient not finite; updated weights not finite; a gradient norm that is too large.
    Only `weights` is found when the weights have changed."""
    message: str
    figures: dict[str, Any]
    """For whoever looks into it."""


@dataclass(frozen=True)
class Bins:
    """Fixed bins, in which values of all ranks and steps are counted alike; see
    metrics.histogram."""

    scale: Literal["linear", "log"]
    """`linear`: equal widths from low to high. `log`: one bin from 0 to low, then equal ratios."""
    low: float
    high: float
    """What lies outside is counted in the first or the last bin."""
    count: int


@dataclass(frozen=True)
class Histogram:
    """How many of the values lie in each bin."""

    bins: Bins
    counts: tuple[int, ...]


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, the same on every rank. Made by training.step."""

    grad_norm: float
    """Before clipping; NaN of a gradient that is not finite."""
    lr: float
    sums: dict[str, tuple[float, float]]
    """Metric name → (sum, count) over the valid tokens of all data-parallel ranks."""
    histograms: dict[str, Histogram]
    """Metric name → its values at those tokens; none of a step whose values are not sound."""
    fault: StepFault | None = None


@dataclass(frozen=True)
class RolloutProgress:
    """How far a call for samples has come."""

    answered: int
    total: int
    """Responses."""
    tokens: int
    """Of those that were answered."""
    seconds: float
    serving: int
    engines: int
    """Those that serve, of all."""

    def describe(self) -> str:
        pace = self.tokens / self.seconds if self.seconds else 0.0
        return f"{pace:,.0f} tok/s, {self.serving} of {self.engines} engines"
