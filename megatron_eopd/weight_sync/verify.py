"""Does the engine hold the trainer's weights? Both score the same sequences, after every sync.

Checksums prove that the bytes arrived; this proves that they ended up in the right parameters, in
the layout that the engine computes with. Two implementations never agree to the last bit, and on
unlikely tokens bfloat16 logits are whole steps of 0.125 apart. So the *mean* over *likely* tokens
is compared, and with the rounding that these two stacks showed at their first sync.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_eopd.config import WeightSyncConfig
from megatron_eopd.errors import EngineError
from megatron_eopd.records import Prompt, Rollout

Logprobs = Sequence[Sequence[float]]

EXPECTED_ROUNDING = {"float32": 3e-5, "bfloat16": 0.03}
"""Mean |Δ| in nats over likely tokens between two sound implementations, about what was measured
with vLLM on CPU (docs/correctness.md). The first sync is judged by it, and no baseline is
taken to be smaller: a lucky first figure must not make the second one a fault."""

NUM_PROMPTS, NUM_ROLLOUTS = 2, 2
PROBE_TOKENS = 96
"""Of a sequence: the end of the prompt and the beginning of the response."""
MIN_TOKENS = 8
"""If fewer tokens are likely, the likeliest this many are compared."""


@dataclass(frozen=True)
class Probe:
    """What one comparison found."""

    difference: float
    """Mean |Δ| in nats over the likely tokens; nan if any token has none."""
    verdict: Literal["sound", "warn", "stop"]
    message: str
    """What it means and what to do; empty where it is sound."""

    @property
    def rank(self) -> tuple[int, float]:
        """A larger one is worse."""
        return ("sound", "warn", "stop").index(self.verdict), self.difference


def probe_sequences(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], max_tokens: int
) -> list[list[int]]:
    """Token ids to score: a few real prompts, and a few of the newest responses behind theirs.

    Spread evenly over both; each at most `max_tokens` and PROBE_TOKENS.
    """
    max_tokens = min(max_tokens, PROBE_TOKENS)
    half = max_tokens // 2
    ids = [list(p.prompt_ids[-max_tokens:]) for p in _spread(prompts, NUM_PROMPTS)]
    ids += [
        [*r.prompt.prompt_ids[-half:], *r.response_ids[:half]]
        for r in _spread(rollouts, NUM_ROLLOUTS)
    ]
    return [sequence for sequence in ids if len(sequence) > 1]


def _spread(items: Sequence, count: int) -> list:
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


def mean_difference(
    engine: Logprobs, trainer: Logprobs, min_probability: float
) -> tuple[float, int]:
    """(mean |Δ| in nats, number of tokens) over the tokens that the trainer finds likely.

    Raises:
        EngineError: the trainer's own values are nan, so nothing can be said of the engine's.
    """
    ours, theirs = (
        torch.tensor([x for row in rows for x in row], dtype=torch.float64)
        for rows in (trainer, engine)
    )
    if ours.isnan().any():
        raise EngineError(
            "the trainer's own log-probabilities of real tokens are nan: its weights are broken. "
            "Nothing was saved; start again from an earlier checkpoint, with a lower training.lr."
        )
    differences = (ours - theirs).abs()
    if differences.isnan().any():
        return math.nan, len(ours)
    floor = ours.sort(descending=True).values[:MIN_TOKENS][-1]
    likely = ours >= min(math.log(min_probability), floor.item())
    return differences[likely].mean().item(), int(likely.sum())


class SyncCheck:
    """Tells rounding from a fault, by what the first sound sync of this start showed."""

    def __init__(self, options: WeightSyncConfig, dtype: str) -> None:
        """`dtype`: the coarser one of the trainer's and the engine's."""
        self._options = options
        self._rounding = EXPECTED_ROUNDING[dtype]
        self._has_baseline = False

    def judge(self, engine: Logprobs, trainer: Logprobs, version: int) -> Probe:
        options = self._options
        difference, count = mean_difference(engine, trainer, options.probe_min_probability)
        warn_at, stop_at = (
            factor * self._rounding
            for factor in (options.probe_warn_factor, options.probe_stop_factor)
        )
        measured = (
            f"after the sync of weight version {version} the engine's log-probabilities of "
            f"{count} likely tokens differ from the trainer's by {difference:.3g} nats on average; "
            f"rounding alone makes {self._rounding:.3g}."
        )
        if not difference < stop_at:  # nan is not
            return Probe(
                difference,
                "stop",
                f"{measured} That is more than weight_sync.probe_stop_factor="
                f"{options.probe_stop_factor:g} times as much: the engine does not hold the "
                f"trainer's weights, or computes something else. weight_sync.verify=false goes on "
                f"without the check.",
            )
        if difference < warn_at:
            if not self._has_baseline:
                self._rounding, self._has_baseline = max(self._rounding, difference), True
            return Probe(difference, "sound", "")
        return Probe(
            difference,
            "warn",
            f"{measured} That is more than weight_sync.probe_warn_factor="
            f"{options.probe_warn_factor:g} times as much. Samples may come from weights that are "
            f"not the trainer's: watch weight_sync/probe_difference and mismatch/*.",
        )
