"""Reference answers in the place of samples. In: the prompts of an iteration. Out: which of them
are answered by the student, and the answers of the others as Rollouts.

On-policy distillation recovers slowly where the student writes garbage: its teacher then scores
garbage. Training on answers that others wrote, for a while or for a share of the prompts, is the
λ of GKD (arXiv 2306.13649). The loss and its metrics are the same for both.
"""

import random
from collections.abc import Sequence

from megatron_eopd.config import RolloutConfig
from megatron_eopd.data.prompts import PromptSet
from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.schedules import Progress, scheduled


def reference_fraction_at(rollout: RolloutConfig, progress: Progress) -> float:
    """Share of prompts with references."""
    iters = rollout.reference_schedule_iters
    return scheduled(
        rollout.reference_fraction,
        rollout.final_reference_fraction,
        rollout.reference_schedule,
        progress.share if iters is None else progress.iterations / iters,
    )


def places_of_references(count: int, fraction: float, seed: int, iteration: int) -> set[int]:
    """Which of `count` prompts are answered by references: on average over iterations exactly
    `fraction` of them, the same on every rank and after a resume."""
    draw = random.Random(f"references {seed} {iteration}")
    # Rounded at random: of four prompts a tenth must not always be none.
    number = int(fraction * count + draw.random()) if fraction < 1 else count
    return set(draw.sample(range(count), number))


def reference_rollouts(
    prompts: Sequence[Prompt], source: PromptSet, samples_per_prompt: int, version: int
) -> list[Rollout]:
    """`samples_per_prompt` of each prompt, prompt by prompt, as an engine would return them."""
    jobs = [(prompt, i) for prompt in prompts for i in range(samples_per_prompt)]
    return [
        Rollout(
            prompt=prompt,
            sample_index=i,
            response_ids=(ids := source.reference(prompt, i)),
            response_logprobs=(0.0,) * len(ids),
            finish_reason="stop",
            weight_version=version,
            source="reference",
        )
        for prompt, i in jobs
    ]
