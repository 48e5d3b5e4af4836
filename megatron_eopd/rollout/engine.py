"""The protocol of a rollout engine. In: prompts. Out: rollouts stamped with a weight version.

Every method is collective: all ranks of the trainer call it, in the same order, and all get the
same answer or the same error. An engine that lives on one rank broadcasts.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.weight_sync.verify import Probe


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    samples_per_prompt: int
    temperature: float
    """0: the likeliest token, always."""
    max_response_length: int
    stop_ids: tuple[int, ...]
    seed: int
    """Together with the prompt index and the sample index this fixes every draw."""
    top_p: float = 1.0
    """Draw from the smallest set of most likely tokens whose probabilities, after the temperature,
    sum to this much; log-probabilities are of that distribution. For evaluations: training stays
    at 1, as truncated sampling biases every ratio between the engine's and the trainer's
    probabilities."""

    def __post_init__(self) -> None:
        assert 0 < self.top_p <= 1, f"top_p={self.top_p} is not above 0 and at most 1"


@dataclass(frozen=True)
class SyncReport:
    """One weight sync, as metrics see it."""

    version: int
    seconds: float
    num_bytes: int
    probe: Probe | None = None
    """What the comparison of log-probabilities afterwards found, where there was one."""

    @property
    def is_unsound(self) -> bool:
        """Whether the engine must not sample: it does not hold the trainer's weights."""
        return self.probe is not None and self.probe.verdict == "stop"


Finished = Callable[[int, Rollout], None]
"""Hears of a response, by its number in the list that `generate` returns, once it has ended."""


class RolloutEngine(Protocol):
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: Finished | None = None
    ) -> list[Rollout]:
        """`samples_per_prompt` rollouts of each prompt, prompt by prompt in order.

        finished: called on global rank 0 alone, once for each response, in any order; on the other
            ranks it may be None. The engine waits while it runs. What it raises ends the call on
            every rank, and the engine may be gone then; what it was told before stays true,
            whatever happens to the engine later.
        """
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability, in nats at temperature 1, of every token but the first of each
        sequence. The probe that shows which weights the engine really holds."""
        ...

    def update_weights(self, version: int) -> SyncReport:
        """Make the engine sample from the student's present weights, known as `version`."""
        ...

    def close(self) -> None: ...


def sample_seed(seed: int, prompt: Prompt, sample_index: int) -> int:
    """A seed of its own for every response, the same on every layout and after a resume."""
    return hash((seed, prompt.index, sample_index)) & 0x7FFFFFFF


def numbered_samples(
    prompts: Sequence[Prompt], sampling: Sampling
) -> list[tuple[Prompt, int, int]]:
    """(prompt, which of its samples, seed) of every response of a call, prompt by prompt. A prompt
    that comes twice, as in a batch over the end of an epoch, draws other samples then."""
    count, seen, jobs = sampling.samples_per_prompt, Counter(), []
    for prompt in prompts:
        for index in range(count):
            number = seen[prompt.index] * count + index
            jobs.append((prompt, index, sample_seed(sampling.seed, prompt, number)))
        seen[prompt.index] += 1
    return jobs
