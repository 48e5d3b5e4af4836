"""The student on held-out problems. In: an engine, a teacher. Out: named figures, and the samples.

The same stages as training: generate, score, measure; then grade. All ranks get the same figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

from megatron_eopd.config import Config
from megatron_eopd.data.packing import Limits, exchange_size, pack, rounds_of
from megatron_eopd.data.prompt_files import countdown_rows, places, prompt_rows
from megatron_eopd.data.prompts import encode_prompts
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.grading import (
    Graded,
    gold_number,
    grade_countdown,
    grade_last_number,
)
from megatron_eopd.evaluation.pass_at_k import summarize, wilson_interval
from megatron_eopd.metrics.means import divide
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import DEFAULT_TEACHER, Prompt, Rollout
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
    correct: list[bool]
    """Of each sample."""


def held_out_prompts(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """The first `evaluation.num_problems` held-out problems; none without a held-out set.

    Raises:
        ConfigError: a file that is missing or empty, or a line that cannot be used (which one).
    """
    options = config.evaluation
    if options.name is None:
        return []
    if options.prompts is None:
        rows = countdown_rows("test")
    else:
        names = [DEFAULT_TEACHER, *config.teachers]
        rows = prompt_rows(options.prompts, config.data, names, "evaluation.prompts")
    rows = list(islice(rows, options.num_problems))
    ungraded = [row.where for row in rows if options.prompts and gold_number(row.answer) is None]
    if ungraded:
        raise ConfigError(
            f"evaluation.prompts: {len(ungraded)} of {len(rows)} problems have an answer that is "
            f"not one plain number, and could never be graded right: {places(ungraded)}. Take "
            f"these lines out."
        )
    prompts = list(encode_prompts(iter(rows), config.data, tokenizer))
    if not prompts:
        raise ConfigError(f"evaluation.prompts={options.prompts}: no problems in it.")
    return prompts


def evaluate_on(
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
    graded = _grade(rollouts, samples_per_problem, tokenizer, config)
    figures = _summarize(graded, rollouts)
    packed = pack(rollouts, Limits.of(config.training), context.layout)
    rounds = teachers.microbatches(rounds_of(packed, exchange_size(config)))
    means = divide([measure(token_loss, chunks, rounds, context).sums])
    for figure, name in (
        ("reverse_kl", "loss/reverse_kl"),
        ("forward_kl", "loss/forward_kl"),
        ("teacher_entropy", "entropy/teacher_mean"),
        ("student_entropy", "entropy/student_mean"),
    ):
        figures[figure] = means[name]
    name = config.evaluation.name
    return Evaluation(
        {f"eval/{name}/{figure}": value for figure, value in figures.items()},
        rollouts,
        list(chain.from_iterable(graded.correct)),
    )


def _grade(
    rollouts: list[Rollout], samples_per_problem: int, tokenizer: Tokenizer, config: Config
) -> Graded:
    grade = grade_countdown if config.evaluation.prompts is None else grade_last_number
    answers = [r.prompt.answer for r in rollouts[::samples_per_problem]]
    # A response that was cut has not ended, however right it looks.
    texts = [
        tokenizer.decode(r.response_ids) if r.finish_reason == "stop" else None for r in rollouts
    ]
    n = samples_per_problem
    return grade(answers, [texts[i : i + n] for i in range(0, len(texts), n)])


def _summarize(graded: Graded, rollouts: list[Rollout]) -> dict[str, float]:
    num_problems, samples_per_problem = len(graded.correct), len(graded.correct[0])
    ks = [k for k in REPORTED_K if k <= samples_per_problem]
    figures = summarize(graded.correct, graded.canonical, graded.num_valid, ks)
    # Samples of one problem are not independent: the problems alone count.
    low, high = wilson_interval(figures[f"avg@{samples_per_problem}"], num_problems)
    figures |= {"accuracy_low": low, "accuracy_high": high}
    cut = sum(r.finish_reason == "length" for r in rollouts)
    return figures | {"truncated_fraction": cut / len(rollouts)}
