"""Signals of chosen responses, taken down while the loss is computed. In: what the loss knows of a
chunk of tokens. Out: columns of all ranks' tokens, on rank 0.

Nothing here waits for the device before the step is done.
"""
# Shapes: N valid tokens of a microbatch, C of them in a chunk.

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_eopd.losses.token_details import TokenDetails
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import MicroBatch, Rollout

SIBLINGS = 4
"""Responses to one prompt are enough to see where they part; then those to others come first."""

Columns = dict[str, np.ndarray]
"""One row for each token: `response` (its number among the chosen), `token` (its place in the
response), and what was taken down."""


def choose(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """The first ones, but SIBLINGS of each prompt before any more of it; in their order."""
    seen: Counter[tuple[int, tuple[int, ...]]] = Counter()
    turns = []
    for rollout in rollouts:
        prompt = rollout.prompt.index, rollout.prompt.prompt_ids
        turns.append(seen[prompt] // SIBLINGS)
        seen[prompt] += 1
    first = sorted(range(len(rollouts)), key=lambda n: turns[n])[:count]
    return [rollouts[n] for n in sorted(first)]


class TokenNotes:
    """Of this rank's tokens. The rollouts are known by identity: plans hold the same objects."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._numbers = {id(rollout): n for n, rollout in enumerate(rollouts)}
        self._kept: list[dict[str, torch.Tensor | np.ndarray]] = []

    def take(
        self,
        batch: MicroBatch,
        rows: slice,
        columns: Mapping[str, torch.Tensor],
        details: Callable[[slice], TokenDetails],
        is_wanted: Callable[[Rollout], bool] = lambda _: True,
    ) -> None:
        """What is wanted of a chunk.

        Collective over tensor-parallel ranks, which have the same tokens. `rows`: which tokens of
        the microbatch the chunk has; `columns`: each [C]; `details`: of a part of the chunk;
        `is_wanted`: where several teachers come with the same responses, of which.
        """
        for part, owners in self._wanted(batch, rows, is_wanted):
            own = {name: values_C[part].detach().clone() for name, values_C in columns.items()}
            own |= details(part)._asdict()
            numbers = [number for number, tokens in owners for _ in tokens]
            tokens = [token for _, tokens in owners for token in tokens]
            own |= {"response": np.array(numbers, np.int32), "token": np.array(tokens, np.int32)}
            self._kept.append(own)

    def _wanted(
        self, batch: MicroBatch, rows: slice, is_wanted: Callable[[Rollout], bool]
    ) -> Iterator[tuple[slice, list[tuple[int, Sequence[int]]]]]:
        """Pieces of the chunk as long as possible, and which responses' tokens they are."""
        pieces: list[tuple[slice, list[tuple[int, Sequence[int]]]]] = []
        first = 0
        for part in batch.responses:
            begin, end = max(first, rows.start or 0), first + len(part.tokens)
            end = end if rows.stop is None else min(end, rows.stop)
            number = self._numbers.get(id(part.rollout))
            if number is not None and begin < end and is_wanted(part.rollout):
                owner = (number, part.tokens[begin - first : end - first])
                place = slice(begin - (rows.start or 0), end - (rows.start or 0))
                if pieces and pieces[-1][0].stop == place.start:
                    before, owners = pieces.pop()
                    pieces.append((slice(before.start, place.stop), [*owners, owner]))
                else:
                    pieces.append((place, [owner]))
            first += len(part.tokens)
        yield from pieces

    def gather(self, context: ParallelContext) -> Columns | None:
        """All tokens that were taken down, in no order; on rank 0, None on the others.

        Collective over all ranks of the student, through host memory: one after the other those
        that have some send them, so that rank 0 never holds more than there is.
        """
        own: Columns | None = None
        if self._kept and context.layout.tp_rank == 0:  # the others have the same
            own = {name: _joined([kept[name] for kept in self._kept]) for name in self._kept[0]}
        group = context.cpu_group
        is_first = dist.get_rank(group) == 0
        told = [False] * dist.get_world_size(group) if is_first else None
        dist.gather_object(own is not None, told, group=group, group_dst=0)
        if not is_first:
            if own is not None:
                dist.send_object_list([own], group=group, group_dst=0)
            return None
        parts = [] if own is None else [own]
        for rank in (n for n, has_some in enumerate(told) if has_some and n):
            box: list = [None]
            dist.recv_object_list(box, group=group, group_src=rank)
            parts += box
        names = parts[0] if parts else ()
        return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _joined(values: Sequence[torch.Tensor | np.ndarray]) -> np.ndarray:
    return np.concatenate([x if isinstance(x, np.ndarray) else x.cpu().numpy() for x in values])
