"""The protocol of a rollout engine. In: prompts. Out: rollouts stamped with a weight version.

Every method is collective: all ranks of the trainer call it, in the same order, and all get the
same answer or the same error. An engine that lives on one rank broadcasts.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.weight_sync.verify import Probe

SAMPLER = "the trainer's exact sampler"
"""The name of the engine that is the student itself."""


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
    """Of the whole, without the probe."""
    num_bytes: int
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds of `gather`, `hop`, `hand_over`, `wait` (each of the rank that took longest, see
    TransferTimes), of `load` (of the engine that took longest, beside them), and of `probe`."""
    probe: Probe | None = None
    """What the comparison of log-probabilities afterwards found, where there was one: the worst of
    the engines that serve."""

    @property
    def is_unsound(self) -> bool:
        """Whether no engine may sample: none holds the trainer's weights."""
        return self.probe is not None and self.probe.verdict == "stop"


Finished = Callable[[int, Rollout], None]
"""Hears of a response, by its number in the list that `generate` returns, once it has ended."""


class RolloutEngine(Protocol):
    name: str
    """Of its kind, for reports."""
    compares_weights: bool
    """Whether it samples with a copy of the student's weights, which a probe can compare."""

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

    def update_weights(self, version: int, probes: Sequence[Sequence[int]] = ()) -> SyncReport:
        """Make the engine sample from the student's present weights, known as `version`. `probes`:
        token ids whose log-probabilities engine and trainer compare then."""
        ...

    def asleep(self) -> AbstractContextManager[None]:
        """While the student trains: an engine on the same devices lets go of their memory, weights
        included, until the next `update_weights`."""
        ...

    def metrics(self) -> dict[str, float]:
        """What it did since this was asked last, on global rank 0; empty on the others."""
        ...

    def close(self, error: BaseException | None = None) -> None:
        """`error`: why the run ends early."""
        ...


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
