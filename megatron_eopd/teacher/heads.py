"""What the loss reads of the teachers: logits or top k of some tokens of a microbatch.

In: a microbatch's TeacherParts, which may come from several teachers. Out: one tensor for all.
"""
# Shapes: N tokens of a microbatch, C consecutive ones of them, M those of one teacher, V this
# rank's columns of the vocabulary, H a teacher's hidden size.

from collections.abc import Mapping, Sequence

import torch

from megatron_eopd.losses.head_products import logits_of
from megatron_eopd.losses.teacher_mixture import Spoken
from megatron_eopd.records import HiddenStates, Logits, TeacherPart, TeacherTopK

Heads = Mapping[str, torch.Tensor]
"""Teacher → its LM head [V, H] with the student's cut of the vocabulary, where payloads are hidden
states."""


def teacher_logits(
    parts: Sequence[TeacherPart],
    rows: slice,
    heads: Heads,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[C, V], of the tokens `rows`, in each teacher's dtype or in `dtype`; without gradient.
    `parts` must not be empty."""
    with torch.no_grad():
        here = _of_rows(parts, rows)
        return _scatter(here, [_logits_of(part, heads, dtype) for part in here])


def spoken_logits(
    parts: Sequence[TeacherPart],
    rows: slice,
    heads: Heads,
    weights: Mapping[str, float],
    dtype: torch.dtype | None = None,
) -> list[Spoken]:
    """What each teacher says of the tokens `rows`, counted from the first of them."""
    with torch.no_grad():
        here = [part for part in _of_rows(parts, rows) if part.runs]
        return [
            Spoken(weights[part.teacher], part.runs, _logits_of(part, heads, dtype))
            for part in here
        ]


def teacher_top_k(
    parts: Sequence[TeacherPart], rows: slice, k: int, device: torch.device
) -> TeacherTopK:
    """Of the tokens `rows`; without parts, k columns of no tokens."""
    if not parts:
        ids_0K = torch.zeros(0, k, dtype=torch.long, device=device)
        none_0 = torch.zeros(0, device=device)
        return TeacherTopK(ids_0K, ids_0K.float(), none_0, none_0, none_0)
    here = _of_rows(parts, rows)
    columns = zip(*(part.payload for part in here), strict=True)
    return TeacherTopK(*(_scatter(here, column) for column in columns))


def _logits_of(part: TeacherPart, heads: Heads, dtype: torch.dtype | None) -> torch.Tensor:
    if isinstance(part.payload, Logits):
        return part.payload.logits_NV
    assert isinstance(part.payload, HiddenStates), part.payload
    return logits_of(part.payload.hidden_NH, heads[part.teacher], dtype)


def _of_rows(parts: Sequence[TeacherPart], rows: slice) -> list[TeacherPart]:
    """The parts of these tokens only, counted from the first of them; at least one."""
    wanted = range(rows.start or 0, _num_tokens(parts) if rows.stop is None else rows.stop)
    here = [_clip(part, wanted) for part in parts]
    return [part for part in here if part.runs] or here[:1]


def _num_tokens(parts: Sequence[TeacherPart]) -> int:
    return max((run.stop for part in parts for run in part.runs), default=0)


def _clip(part: TeacherPart, wanted: range) -> TeacherPart:
    """Runs rise, so what is wanted of a part lies in one piece."""
    before = sum(len(_common(run, range(wanted.start))) for run in part.runs)
    common = [_common(run, wanted) for run in part.runs]
    size = sum(map(len, common))
    runs = tuple(range(r.start - wanted.start, r.stop - wanted.start) for r in common if r)
    payload = type(part.payload)(*(x[before : before + size] for x in part.payload))
    return TeacherPart(part.teacher, runs, payload)


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _scatter(parts: Sequence[TeacherPart], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """One row for each token, from the rows of each part's tokens."""
    if len(parts) == 1:
        return values[0]
    size = sum(len(value) for value in values)
    # A teacher of another type gives way to the wider one.
    dtype = max((value.dtype for value in values), key=lambda dtype: dtype.itemsize)
    out = values[0].new_empty(size, *values[0].shape[1:], dtype=dtype)
    for part, value in zip(parts, values, strict=True):
        for run, rows in zip(part.runs, value.split(list(map(len, part.runs))), strict=True):
            out[run.start : run.stop] = rows
    return out
