"""What is known of every token of some responses. Made by tokens.notes, read by viewing/.

Token t of a response is described by the models' predictions *for* it, from the tokens before it.
"""
# Shapes: T tokens of all responses, one response behind the other, G tokens whose most probable
# alternatives are kept, K of those for each: TOP of the teacher's, then TOP of the student's.

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

TOP = 5
"""Most probable tokens of each model."""
NOTABLE_KL = 1.0
"""Nats of reverse KL: there the student goes where the teacher would not."""


class Signal(NamedTuple):
    """A number at each token, and how people are told of it."""

    label: str
    unit: str
    text: str


SIGNALS = {
    "teacher_entropy": Signal("teacher entropy", "nats", "of the teacher's prediction, H"),
    "gate": Signal("gate", "share", "how far forward KL joins the loss here, 0 to 1"),
    "reverse_kl": Signal("reverse KL", "nats", "KL(student ‖ teacher)"),
    "forward_kl": Signal("forward KL", "nats", "KL(teacher ‖ student)"),
    "student_entropy": Signal("student entropy", "nats", "of the student's prediction"),
    "engine_mismatch": Signal(
        "engine mismatch",
        "nats",
        "log-probability of the token: the trainer's minus the engine's, in the first optimizer "
        "step of an iteration, where both have the same weights unless the rollout was replayed",
    ),
    "student_logprob": Signal("log q", "nats", "the student's log-probability of the token"),
    "teacher_logprob": Signal("log p", "nats", "the teacher's log-probability of the token"),
    "loss": Signal("loss", "nats", "the token's part of the objective"),
}
"""Column → what it says. All at the temperatures of the loss; float32, NaN where unknown."""


class RecordedPrompt(NamedTuple):
    index: int
    """In the prompt set, or in the evaluation's problems."""
    text: str
    ids: tuple[int, ...]
    answer: str
    teacher: str
    read_by_teacher: str = ""
    """What the teacher reads in its place, with special tokens; empty where it reads the same."""


class RecordedResponse(NamedTuple):
    prompt: int
    """Which of the record's prompts it answers."""
    sample_index: int
    length: int
    """Tokens."""
    finish_reason: Literal["stop", "length"]
    source: Literal["sampled", "reference"]
    step: int
    """Optimizer steps that the student had taken since it wrote it."""
    verdict: str
    """As a grader found; empty where none was asked."""


class Piece(NamedTuple):
    """What a token stands for."""

    content: bytes
    """Any bytes: a token may be a part of a character."""
    is_special: bool


@dataclass(frozen=True)
class About:
    """What a record was made of."""

    kind: Literal["training", "evaluation"]
    iteration: int
    """Weight version of the student."""
    task: str
    """Of an evaluation; empty for training."""
    objective: str
    threshold: float
    """τ, in nats."""
    gate: str
    student: str
    teachers: dict[str, str]
    """Name → model."""
    temperature: float
    """Of the rollouts."""
    payload: str
    top_tokens: Literal["notable", "all"]
    """At which tokens the most probable ones are kept: where the teacher's entropy reaches the
    threshold or reverse KL NOTABLE_KL, or everywhere."""


@dataclass(frozen=True)
class TokenRecord:
    about: About
    prompts: tuple[RecordedPrompt, ...]
    responses: tuple[RecordedResponse, ...]
    """Those of a prompt stand together."""
    ids_T: np.ndarray
    """int32."""
    signals: dict[str, np.ndarray]
    """By the names of SIGNALS: float32 [T]."""
    student_rank_T: np.ndarray
    """int32: 1 of the most probable token; 0 where unknown."""
    teacher_rank_T: np.ndarray
    top_rows_G: np.ndarray
    """int32, rising: which of the T tokens have alternatives."""
    top_ids_GK: np.ndarray
    """int32; −1 where there is none, or where the teacher's list has it already."""
    top_student_logprobs_GK: np.ndarray
    """float32; NaN where unknown."""
    top_teacher_logprobs_GK: np.ndarray
    pieces: dict[int, Piece]
    """Of all ids above."""

    @property
    def starts(self) -> list[int]:
        """Where each response begins among the T tokens, and where the last one ends."""
        return np.cumsum([0, *(r.length for r in self.responses)]).tolist()
