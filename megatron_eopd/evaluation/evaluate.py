"""The student on held-out problems. In: an engine, a teacher. Out: named figures, and the samples.

The same stages as training: generate, score, measure; then grade. All ranks get the same figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eopd.config import Config
from megatron_eopd.data import countdown
from megatron_eopd.data.packing import Limits, pack, rounds_of
from megatron_eopd.data.prompts import countdown_rows, encode_prompts
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.evaluation.pass_at_k import summarize
from megatron_eopd.metrics import divide
from megatron_eopd.models.build import CausalLM
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.rollout.engine import RolloutEngine, Sampling
from megatron_eopd.teacher.pool import TeacherPool
from megatron_eopd.training.step import measure
from megatron_eopd.training.token_loss import TokenLoss

REPORTED_K = (1, 4, 8, 16)
EVALUATION_SEED = 0x5EED
"""The same draws at every evaluation, so that two evaluations differ by the weights alone."""


@dataclass(frozen=True)
class Evaluation:
    figures: dict[str, float]
    """`eval/<task>/<figure>` → value."""
    samples: list[Rollout]


def held_out_prompts(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """The first `evaluation.num_problems` held-out problems; none without a task."""
    if config.evaluation.task is None:
        return []
    rows = countdown_rows("test")
    kept = (row for row, _ in zip(rows, range(config.evaluation.num_problems), strict=False))
    return list(encode_prompts(kept, config.data, tokenizer))


def evaluate(
    prompts: list[Prompt],
    engine: RolloutEngine,
    teachers: TeacherPool,
    token_loss: TokenLoss,
    chunks: Sequence[CausalLM],
    tokenizer: Tokenizer,
    config: Config,
    context: ParallelContext,
) -> Evaluation:
    """pass@k, diversity, and the divergences from the teacher on the student's own answers."""
    samples_per_problem = config.evaluation.samples_per_problem
    rollouts = engine.generate(
        prompts,
        Sampling(
            samples_per_prompt=samples_per_problem,
            temperature=config.rollout.temperature,
            max_response_length=config.rollout.max_response_length,
            stop_ids=tokenizer.stop_ids,
            seed=EVALUATION_SEED,
        ),
    )
    figures = _grade(rollouts, samples_per_problem, tokenizer)
    packed = pack(rollouts, Limits.of(config.training), context.layout)
    rounds = teachers.microbatches(rounds_of(packed, config.exchange_size))
    means = divide([measure(token_loss, chunks, rounds, context).sums])
    for figure, name in (
        ("reverse_kl", "loss/reverse_kl"),
        ("forward_kl", "loss/forward_kl"),
        ("teacher_entropy", "entropy/teacher_mean"),
        ("student_entropy", "entropy/student_mean"),
    ):
        figures[figure] = means[name]
    task = config.evaluation.task
    return Evaluation({f"eval/{task}/{name}": value for name, value in figures.items()}, rollouts)


def _grade(
    rollouts: list[Rollout], samples_per_problem: int, tokenizer: Tokenizer
) -> dict[str, float]:
    correct, canonical, num_valid = [], [], []
    for first in range(0, len(rollouts), samples_per_problem):
        group = rollouts[first : first + samples_per_problem]
        problem = countdown.Problem.from_answer(group[0].prompt.answer)
        texts = [tokenizer.decode(r.response_ids) for r in group]
        # A response that was cut has not ended, however right it looks.
        ended = [r.finish_reason == "stop" for r in group]
        marks = [e and countdown.verify(problem, t) for e, t in zip(ended, texts, strict=True)]
        correct.append(marks)
        canonical.append(
            [countdown.canonical(t) if m else "" for m, t in zip(marks, texts, strict=True)]
        )
        num_valid.append(countdown.num_valid_traces(problem))
    ks = [k for k in REPORTED_K if k <= samples_per_problem]
    figures = summarize(correct, canonical, num_valid, ks)
    figures["truncated_fraction"] = sum(r.finish_reason == "length" for r in rollouts) / len(
        rollouts
    )
    return figures
