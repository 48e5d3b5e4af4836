"""The tokens of a microbatch by teacher. In: a MicroBatch, some of its tokens. Out: those of each
teacher, as a MicroBatch of its own, and who weighs how much."""
# Shapes: N valid response tokens of a microbatch, C consecutive ones of them, M those of a teacher.

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch

from megatron_eopd.records import MicroBatch, ResponseTokens, TeacherPart


class Own(NamedTuple):
    """One teacher's share of a chunk."""

    batch: MicroBatch
    """Its M tokens of the microbatch alone."""
    rows: slice
    """Which of them are in the chunk."""
    runs: tuple[range, ...]
    """Where these are in the chunk, counted from its first token."""


def own_tokens(batch: MicroBatch, rows: slice, teacher: str) -> Own:
    """Of a teacher that speaks of none: no tokens."""
    part = next((p for p in batch.teacher if p.teacher == teacher), None)
    runs = part.runs if part is not None else ()
    first, last, _ = rows.indices(batch.num_valid_tokens)
    before = sum(len(range(run.start, min(run.stop, first))) for run in runs)
    here = [range(max(run.start, first), min(run.stop, last)) for run in runs]
    count = sum(map(len, here))
    moved = _joined(range(run.start - first, run.stop - first) for run in here if run)
    return Own(_of_teacher(batch, part), slice(before, before + count), moved)


def _joined(rising: Iterable[range]) -> tuple[range, ...]:
    """The same numbers, in as few runs as they are."""
    found: list[range] = []
    for run in rising:
        if found and found[-1].stop == run.start:
            run = range(found.pop().start, run.stop)
        found.append(run)
    return tuple(found)


def _of_teacher(batch: MicroBatch, part: TeacherPart | None) -> MicroBatch:
    runs = () if part is None else part.runs
    count = sum(map(len, runs))
    if part is not None and count == batch.num_valid_tokens:
        return replace(batch, teacher=(part,))
    return replace(
        batch,
        target_ids_N=pick(batch.target_ids_N, runs),
        rollout_logprobs_N=pick(batch.rollout_logprobs_N, runs),
        sampled_N=pick(batch.sampled_N, runs),
        positions_N=pick(batch.positions_N, runs),
        responses=_responses(batch.responses, runs),
        teacher=() if part is None else (part._replace(runs=(range(count),)),),
    )


def _responses(
    responses: Sequence[ResponseTokens], runs: Sequence[range]
) -> tuple[ResponseTokens, ...]:
    """Those that a teacher speaks of, each of them in one run."""
    starts = {run.start for run in runs if run}
    firsts = accumulate((len(response.tokens) for response in responses), initial=0)
    pairs = zip(responses, firsts, strict=False)
    return tuple(response for response, first in pairs if response.tokens and first in starts)


def pick(values_N: torch.Tensor, runs: Sequence[range]) -> torch.Tensor:
    """The rows of the runs, one behind the other; a view where they are one piece."""
    pieces = [values_N[run.start : run.stop] for run in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat([values_N[:0], *pieces])


def spread(values_M: torch.Tensor, runs: Sequence[range], count: int) -> torch.Tensor:
    """[count]: back in their places, 0 elsewhere. Differentiable."""
    if len(values_M) == count:
        return values_M
    out = values_M.new_zeros(count)
    for run, values in zip(runs, values_M.split(list(map(len, runs))), strict=True):
        out[run.start : run.stop] = values
    return out


def weights_of_tokens(
    parts: Sequence[TeacherPart], rows: slice, weights: Mapping[str, float], like_C: torch.Tensor
) -> torch.Tensor:
    """[C]: the sum of the weights of each token's teachers."""
    out = torch.zeros_like(like_C)
    for part in parts:
        for run in part.runs:
            first, last = run.start - (rows.start or 0), run.stop - (rows.start or 0)
            out[max(first, 0) : max(last, 0)] += weights[part.teacher]
    return out
