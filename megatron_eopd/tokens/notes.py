"""Signals of chosen responses, taken down while the loss is computed. In: what the loss knows of a
chunk of tokens. Out: columns of all ranks' tokens, on rank 0.

Nothing here waits for the device before the step is done.
"""
# Shapes: N valid tokens of a microbatch, C of them in a chunk, P of a piece that is taken down.

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

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
    seen: dict[int, int] = {}
    turns = []
    for rollout in rollouts:
        before = seen.get(id(rollout.prompt), 0)
        seen[id(rollout.prompt)] = before + 1
        turns.append(before // SIBLINGS)
    first = sorted(range(len(rollouts)), key=lambda n: turns[n])[:count]
    return [rollouts[n] for n in sorted(first)]


class TokenNotes:
    """Of this rank's tokens. The rollouts are known by identity: plans hold the same objects."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._numbers = {id(rollout): n for n, rollout in enumerate(rollouts)}
        self._kept: list[dict[str, torch.Tensor | np.ndarray]] = []
        self._threshold: float | torch.Tensor = float("nan")

    def take(
        self,
        batch: MicroBatch,
        rows: slice,
        columns: Mapping[str, torch.Tensor],
        details: Callable[[slice], TokenDetails],
        threshold: float | torch.Tensor,
    ) -> None:
        """What is wanted of a chunk.

        Collective over tensor-parallel ranks, which have the same tokens. `rows`: which tokens of
        the microbatch the chunk has; `columns`: each [C]; `details`: of a part of the chunk.
        """
        for part, numbers, tokens in self._wanted(batch, rows):
            own = {name: values_C[part].detach().clone() for name, values_C in columns.items()}
            own |= details(part)._asdict()
            self._kept.append(own | {"response": numbers, "token": tokens})
            self._threshold = threshold

    def _wanted(
        self, batch: MicroBatch, rows: slice
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Pieces of the chunk as long as possible, and of which responses' tokens they are."""
        owners = [
            (self._numbers.get(id(part.rollout), -1), token)
            for part in batch.responses
            for token in part.tokens
        ][rows]
        place = 0
        for is_wanted, run in groupby(owners, lambda owner: owner[0] >= 0):
            pairs = np.array(list(run), np.int32)
            if is_wanted:
                yield slice(place, place + len(pairs)), pairs[:, 0], pairs[:, 1]
            place += len(pairs)

    def gather(self, context: ParallelContext) -> tuple[Columns, float] | None:
        """All tokens that were taken down, in no order, and τ; on rank 0, None on the others.

        Collective over all ranks of the student, through host memory.
        """
        own = None
        if self._kept and context.layout.tp_rank == 0:  # the others have the same
            names = self._kept[0]
            own = {name: _joined([kept[name] for kept in self._kept]) for name in names}
            own = (own, float(self._threshold))
        is_first = context.layout.rank == 0
        told = [None] * dist.get_world_size(context.cpu_group) if is_first else None
        dist.gather_object(own, told, dst=0, group=context.cpu_group)
        if not is_first:
            return None
        found = [each for each in told if each is not None]
        if not found:
            return None
        parts = [columns for columns, _ in found]
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, found[0][1]


def _joined(values: Sequence[torch.Tensor | np.ndarray]) -> np.ndarray:
    return np.concatenate([x if isinstance(x, np.ndarray) else x.cpu().numpy() for x in values])
