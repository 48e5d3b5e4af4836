"""A recording in a few figures, for the head of its page, the index and the terminal."""

from typing import NamedTuple

import numpy as np

from megatron_eopd.tokens.record import About, TokenRecord


class Mean(NamedTuple):
    """Of a signal over tokens. One infinite value would make the mean infinite and tell nothing
    of the others, so these are counted apart."""

    mean: float | None
    """Over the tokens at which it is finite; None where there are none."""
    num_infinite: int


class Summary(NamedTuple):
    kind: str
    iteration: int
    task: str
    num_prompts: int
    num_responses: int
    num_tokens: int
    num_truncated: int
    num_references: int
    num_graded: int
    num_right: int
    num_alternatives: int
    """Tokens of which the recording has the most probable alternatives."""
    means: dict[str, float | None]
    """By signal, as Mean has them."""
    num_infinite: dict[str, int]
    lower_bounds: list[str]
    """As the function of this name."""
    has_gate: bool = True
    """As the function of this name; pages of earlier versions do not say."""


def summarize(record: TokenRecord, num_responses: int | None = None) -> Summary:
    """`num_responses`: of the first ones alone, as those of one of two runs."""
    responses = record.responses[:num_responses]
    num_tokens = record.starts[len(responses)]
    means = {name: mean_of(values_T[:num_tokens]) for name, values_T in record.signals.items()}
    return Summary(
        kind=record.about.kind,
        iteration=record.about.iteration,
        task=record.about.task,
        num_prompts=len(record.prompts),
        num_responses=len(responses),
        num_tokens=num_tokens,
        num_truncated=sum(r.finish_reason == "length" for r in responses),
        num_references=sum(r.source == "reference" for r in responses),
        num_graded=sum(r.verdict != "" for r in responses),
        num_right=sum(r.verdict == "right" for r in responses),
        num_alternatives=int((record.top_rows_G < num_tokens).sum()),
        means={name: each.mean for name, each in means.items()},
        num_infinite={name: each.num_infinite for name, each in means.items()},
        lower_bounds=lower_bounds(record.about),
        has_gate=has_gate(record.about),
    )


def mean_of(values: np.ndarray) -> Mean:
    """NaN is unknown, and left out."""
    finite = values[np.isfinite(values)]
    mean = float(finite.mean(dtype=np.float64)) if len(finite) else None
    return Mean(mean, int(np.isinf(values).sum()))


def has_gate(about: About) -> bool:
    """Whether the objective lets anything decide where forward KL joins the loss. Where nothing
    does, a gate that is 0 or 1 everywhere is no finding."""
    return about.gate not in ("never", "always")


def lower_bounds(about: About) -> list[str]:
    """Signals that are at least as large as recorded. A teacher that hands over its top k knows
    the distribution as k + 1 parts, and to join tokens to a part never raises a divergence."""
    return ["reverse_kl", "forward_kl"] if about.payload == "topk" else []
