"""A recording in a few figures, for the head of its page, the index and the terminal."""

import warnings
from typing import NamedTuple

import numpy as np

from megatron_eopd.tokens.record import TokenRecord


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
    """Signal → its mean over the tokens at which it is known; None where it nowhere is."""


def summarize(record: TokenRecord) -> Summary:
    responses = record.responses
    return Summary(
        kind=record.about.kind,
        iteration=record.about.iteration,
        task=record.about.task,
        num_prompts=len(record.prompts),
        num_responses=len(responses),
        num_tokens=record.starts[-1],
        num_truncated=sum(r.finish_reason == "length" for r in responses),
        num_references=sum(r.source == "reference" for r in responses),
        num_graded=sum(r.verdict != "" for r in responses),
        num_right=sum(r.verdict == "right" for r in responses),
        num_alternatives=len(record.top_rows_G),
        means={name: _mean(values_T) for name, values_T in record.signals.items()},
    )


def _mean(values: np.ndarray) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN
        mean = float(np.nanmean(values, dtype=np.float64))
    return mean if np.isfinite(mean) else None
