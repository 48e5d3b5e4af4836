"""From the teacher's ranks to the student's: which numbers of which tokens go where.

In: what each rank of the teacher's last stage has scored. Out: on each rank of the student's last
stage, the payloads of its own rollouts, for the tokens and the vocabulary columns that it works on.
Every rank computes the whole plan from the same integers, so nothing is announced; what sender and
receiver have on the same rank is not sent. No rank ever holds the logits of a whole vocabulary.
"""
# Shapes: M tokens of one or more rollouts, V columns of a rank, H hidden size.

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from megatron_eopd.data.packing import own_response_tokens
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.wire import Message, Wire
from megatron_eopd.records import Logits, Payload
from megatron_eopd.teacher.assignment import Item


@dataclass(frozen=True)
class PayloadShape:
    """A payload's kind, and dtype and width of each of its tensors; None is one number a token."""

    kind: type[Payload]
    tensors: tuple[tuple[torch.dtype, int | None], ...]


@dataclass(frozen=True)
class VocabCut:
    """A model's columns in equal parts, one for each tensor-parallel rank."""

    vocab_size: int
    """Tokens that student and teacher share; columns at or past it are padding."""
    width: int
    """Columns of a rank, padding included."""

    def overlap(self, rank: int, other: "VocabCut", other_rank: int) -> tuple[slice, slice] | None:
        """The real columns that both ranks have, as each of them counts its own."""
        starts = rank * self.width, other_rank * other.width
        first = max(starts)
        last = min(starts[0] + self.width, starts[1] + other.width, self.vocab_size)
        if first >= last:
            return None
        return tuple(slice(first - start, last - start) for start in starts)


@dataclass(frozen=True)
class Route:
    """The two ends. Ranks are numbered through both where they are different ones."""

    teacher: Layout
    student: Layout
    teacher_first_rank: int
    teacher_cut: VocabCut
    student_cut: VocabCut

    @property
    def is_local(self) -> bool:
        """Whether every rank already has what it needs, once student and teacher pack alike."""
        is_cut_alike = self.teacher_cut == self.student_cut and self.teacher.cuts_like(self.student)
        return self.teacher_first_rank == 0 and is_cut_alike

    def teacher_rank(self, dp_rank: int, tp_rank: int) -> int:
        return self.teacher_first_rank + self.teacher.last_stage_rank(dp_rank, 0, tp_rank)

    def columns(self, teacher_tp: int, student_tp: int, is_logits: bool) -> tuple | None:
        """(the sender's, the receiver's) columns that pass between two ranks; None if nothing."""
        if is_logits:
            return self.teacher_cut.overlap(teacher_tp, self.student_cut, student_tp)
        # All of the teacher's tensor-parallel ranks have it: each sends to some.
        if student_tp % self.teacher.tp == teacher_tp:
            return slice(None), slice(None)
        return None


def send_scores(
    items: Mapping[int, Item],
    owners: Mapping[int, int],
    held: Mapping[int, Payload],
    route: Route,
) -> Iterator[Message]:
    """What this rank of the teacher's last stage sends, for every receiver.

    `owners`: the teacher's data-parallel rank that scored each item; `held` its own scores.
    """
    me, student = route.teacher, route.student
    for dp_rank, cp_rank in product(range(student.dp), range(student.cp)):
        own = [n for n in items if owners[n] == me.dp_rank and items[n].dp_rank == dp_rank]
        tokens = [own_response_tokens(items[n].rollout, student, cp_rank)[1] for n in own]
        if not any(tokens):
            continue
        for tp_rank in range(student.tp):
            columns = route.columns(me.tp_rank, tp_rank, isinstance(held[own[0]], Logits))
            if columns is None:
                continue
            receiver = student.last_stage_rank(dp_rank, cp_rank, tp_rank)
            for parts in zip(*(held[n] for n in own), strict=True):
                yield receiver, _join_rows(parts, tokens, columns[0])


def _join_rows(
    parts: Sequence[torch.Tensor], tokens: Sequence[list[int]], columns: slice
) -> torch.Tensor:
    """Of each part these tokens and columns, one behind the other; contiguous."""
    rows = [_pick(x, own, columns) for x, own in zip(parts, tokens, strict=True)]
    return torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()


def _pick(x: torch.Tensor, tokens: Sequence[int], columns: slice) -> torch.Tensor:
    """A view where all tokens are wanted, so that only what is sent is copied. Under context
    parallelism they are two runs, and slices wait for no copy of indices to the device."""
    if len(tokens) < len(x):
        x = torch.cat([x[run.start : run.stop] for run in runs_of(tokens)] or [x[:0]])
    return x[:, columns] if x.dim() > 1 else x


def runs_of(rising: Sequence[int]) -> list[range]:
    """The same numbers, as ranges."""
    starts = [n for n in range(len(rising)) if n == 0 or rising[n] != rising[n - 1] + 1]
    ends = [*starts[1:], len(rising)]
    return [range(rising[a], rising[b - 1] + 1) for a, b in zip(starts, ends, strict=False)]


@dataclass(frozen=True)
class Parcel:
    """What one sender has for this rank: some items' tokens, and the place of its columns."""

    sender: int
    counts: dict[int, int]
    """Item → tokens, in order."""
    columns: slice
    buffers: list[torch.Tensor]


def expect_scores(
    items: Mapping[int, Item],
    owners: Mapping[int, int],
    shape: PayloadShape,
    route: Route,
    device: torch.device,
) -> Iterator[Parcel]:
    """What this rank of the student's last stage gets, with empty buffers for it."""
    me = route.student
    for owner in range(route.teacher.dp):
        own = [n for n in items if owners[n] == owner and items[n].dp_rank == me.dp_rank]
        counts = {n: len(own_response_tokens(items[n].rollout, me, me.cp_rank)[1]) for n in own}
        total = sum(counts.values())
        if not total:
            continue
        for tp_rank in range(route.teacher.tp):
            columns = route.columns(tp_rank, me.tp_rank, shape.kind is Logits)
            if columns is None:
                continue
            buffers = []
            for dtype, width in shape.tensors:
                if shape.kind is Logits:
                    width = columns[1].stop - columns[1].start
                size = (total,) if width is None else (total, width)
                buffers.append(torch.empty(size, dtype=dtype, device=device))
            yield Parcel(route.teacher_rank(owner, tp_rank), counts, columns[1], buffers)


def unpack_scores(
    items: Mapping[int, Item],
    parcels: Sequence[Parcel],
    shape: PayloadShape,
    route: Route,
    device: torch.device,
) -> dict[int, Payload]:
    """Item → payload, of this rank's items, from parcels that have arrived."""
    pieces: dict[int, list[tuple[slice, tuple[torch.Tensor, ...]]]] = {}
    for parcel in parcels:
        split = zip(*(x.split(list(parcel.counts.values())) for x in parcel.buffers), strict=True)
        for n, tensors in zip(parcel.counts, split, strict=True):
            pieces.setdefault(n, []).append((parcel.columns, tensors))
    own = [n for n, item in items.items() if item.dp_rank == route.student.dp_rank]
    found: dict[int, Payload] = {}
    for n in own:
        if shape.kind is Logits:
            tokens = own_response_tokens(items[n].rollout, route.student, route.student.cp_rank)[1]
            found[n] = Logits(_join_columns(pieces.get(n, []), len(tokens), shape, route, device))
        elif n in pieces:
            ((_, tensors),) = pieces[n]
            found[n] = shape.kind(*tensors)
        else:  # all its tokens are on other context-parallel ranks
            sizes = ((0,) if width is None else (0, width) for _, width in shape.tensors)
            dtypes = (dtype for dtype, _ in shape.tensors)
            found[n] = shape.kind(
                *(
                    torch.empty(s, dtype=d, device=device)
                    for s, d in zip(sizes, dtypes, strict=True)
                )
            )
    return found


def _join_columns(
    pieces: Sequence[tuple[slice, tuple[torch.Tensor, ...]]],
    num_tokens: int,
    shape: PayloadShape,
    route: Route,
    device: torch.device,
) -> torch.Tensor:
    """[M, V]; padding columns, on the last ranks maybe all of them, are 0, which nobody reads."""
    width = route.student_cut.width
    if pieces and pieces[0][0] == slice(0, width):
        return pieces[0][1][0]
    ((dtype, _),) = shape.tensors
    logits_MV = torch.zeros(num_tokens, width, dtype=dtype, device=device)
    for columns, (block,) in pieces:
        logits_MV[:, columns] = block
    return logits_MV


def exchange_scores(
    items: Mapping[int, Item],
    owners: Mapping[int, int],
    held: Mapping[int, Payload],
    shape: PayloadShape,
    route: Route,
    wire: Wire,
    device: torch.device,
) -> dict[int, Payload]:
    """Item → payload on the student's last stage, {} elsewhere, where both models share ranks."""
    me = route.student.rank
    sends = list(send_scores(items, owners, held, route)) if route.teacher.is_last_stage else []
    parcels: list[Parcel] = []
    if route.student.is_last_stage:
        parcels = list(expect_scores(items, owners, shape, route, device))
    stays = [tensor for receiver, tensor in sends if receiver == me]
    for parcel in parcels:
        if parcel.sender == me:
            parcel.buffers[:] = stays
    wire.swap(
        [message for message in sends if message[0] != me],
        [(p.sender, buffer) for p in parcels if p.sender != me for buffer in p.buffers],
    )
    del sends, stays  # copies, where columns are cut
    if not route.student.is_last_stage:
        return {}
    return unpack_scores(items, parcels, shape, route, device)


def send_head(weight_VH: torch.Tensor, route: Route) -> Iterator[Message]:
    """This rank's rows of the teacher's LM head, for every rank of the student's last stage that
    the teacher's replica of this rank serves."""
    me, student = route.teacher, route.student
    for replica in range(student.dp * student.cp):
        if replica % me.dp != me.dp_rank:
            continue
        for tp_rank in range(student.tp):
            rows = route.teacher_cut.overlap(me.tp_rank, route.student_cut, tp_rank)
            if rows is not None:
                dp_rank, cp_rank = divmod(replica, student.cp)
                receiver = student.last_stage_rank(dp_rank, cp_rank, tp_rank)
                yield receiver, weight_VH[rows[0]].contiguous()


def expect_head(
    route: Route, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, list[Message]]:
    """The head [V, H] with the student's cut, and who fills which rows of it; padding is 0."""
    me = route.student
    weight_VH = torch.zeros(route.student_cut.width, hidden_size, dtype=dtype, device=device)
    owner = (me.dp_rank * me.cp + me.cp_rank) % route.teacher.dp
    messages = []
    for tp_rank in range(route.teacher.tp):
        rows = route.student_cut.overlap(me.tp_rank, route.teacher_cut, tp_rank)
        if rows is not None:
            messages.append((route.teacher_rank(owner, tp_rank), weight_VH[rows[0]]))
    return weight_VH, messages


def exchange_head(
    weight_VH: torch.Tensor | None,
    route: Route,
    hidden_size: int,
    dtype: torch.dtype,
    wire: Wire,
    device: torch.device,
) -> torch.Tensor | None:
    """The head as the student cuts its vocabulary, on its last stage; None elsewhere.

    `weight_VH`: this rank's part on the teacher's last stage, where both models share ranks.
    """
    me = route.student.rank
    sends = list(send_head(weight_VH, route)) if route.teacher.is_last_stage else []
    head_VH, receives = None, []
    if route.student.is_last_stage:
        head_VH, receives = expect_head(route, hidden_size, dtype, device)
    for (_, stays), (_, rows) in zip(
        (message for message in sends if message[0] == me),
        (message for message in receives if message[0] == me),
        strict=True,
    ):
        rows.copy_(stays)
    wire.swap(
        [message for message in sends if message[0] != me],
        [message for message in receives if message[0] != me],
    )
    return head_VH
