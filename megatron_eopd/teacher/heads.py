"""What the loss reads of the teachers: logits or top k of some tokens of a microbatch.

In: a microbatch's TeacherParts, which may come from several teachers. Out: one tensor for all.
"""
# Shapes: N tokens of a microbatch, C consecutive ones of them, M those of one teacher, V this
# rank's columns of the vocabulary, H a teacher's hidden size.

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from megatron_eopd.records import HiddenStates, Logits, TeacherPart, TeacherTopK

Heads = Mapping[str, torch.Tensor]
"""Teacher → its LM head [V, H] with the student's cut of the vocabulary, where payloads are hidden
states."""


def teacher_logits(parts: Sequence[TeacherPart], rows: slice, heads: Heads) -> torch.Tensor:
    """[C, V], of the tokens `rows`; without gradient. `parts` must not be empty."""
    with torch.no_grad():
        here = _of_rows(parts, rows)
        return _scatter(here, [_logits_of(part, heads) for part in here])


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


def _logits_of(part: TeacherPart, heads: Heads) -> torch.Tensor:
    if isinstance(part.payload, Logits):
        return part.payload.logits_NV
    assert isinstance(part.payload, HiddenStates), part.payload
    return F.linear(part.payload.hidden_NH, heads[part.teacher])


def _of_rows(parts: Sequence[TeacherPart], rows: slice) -> list[TeacherPart]:
    """The parts of these tokens only, counted from the first of them."""
    if len(parts) == 1:  # it has all tokens
        (part,) = parts
        payload = type(part.payload)(*(x[rows] for x in part.payload))
        return [TeacherPart(part.teacher, part.tokens_M[: len(payload[0])], payload)]
    here = []
    for part in parts:
        start, stop = rows.start or 0, rows.stop
        inside = part.tokens_M >= start
        if stop is not None:
            inside &= part.tokens_M < stop
        if inside.any():
            payload = type(part.payload)(*(x[inside] for x in part.payload))
            here.append(TeacherPart(part.teacher, part.tokens_M[inside] - start, payload))
    return here or _of_rows(parts[:1], slice(0, 0))


def _scatter(parts: Sequence[TeacherPart], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """One row for each token, from the rows of each part's tokens."""
    if len(parts) == 1:
        return values[0]
    size = sum(len(value) for value in values)
    # A teacher of another type gives way to the wider one.
    dtype = max((value.dtype for value in values), key=lambda dtype: dtype.itemsize)
    out = values[0].new_empty(size, *values[0].shape[1:], dtype=dtype)
    for part, value in zip(parts, values, strict=True):
        out[part.tokens_M] = value.to(dtype)
    return out
