"""Weights of a teacher that follows the student. In: the student, around each of its updates. Out:
the teacher's weights, cut as the teacher is.

    averaged    T ← d · T + (1 − d) · S after every update (of every n-th), in float32
    lagged      S of k updates ago; until there are so many, the S that the run began with

Each is kept once, in the teacher's own cut. Where that is the student's, a shard is taken from the
student's shard on the same rank; else whole tensors go over all ranks, one bucket at a time.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_eopd.config import TeacherConfig
from megatron_eopd.host_memory import in_blocks
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.models.export import Exporter
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_weights import fill_shard, head_shape, weights_of
from megatron_eopd.parallel.collectives import gather_everywhere
from megatron_eopd.parallel.init import ParallelContext

BUCKET_BYTES = 256 * 2**20
"""Of whole tensors that every rank holds at a time, where the cuts differ."""

Shards = Iterable[tuple[int, torch.Tensor]]
"""(number of a teacher's parameter on this rank, the student's values of it)."""


class Followed(Protocol):
    """A student, as training.optimizer makes it trainable."""

    chunks: Sequence[CausalLM]

    def gather_parameters(self) -> None:
        """Have the whole updated parameters on this rank."""
        ...


class Follower(Protocol):
    """What a teacher's weights do while the student is updated."""

    def weights(self) -> Sequence[torch.Tensor]:
        """Of each parameter of the teacher on this rank, as of now."""
        ...

    def tensors(self) -> Sequence[Sequence[torch.Tensor]]:
        """All that must be in a checkpoint, in an order that does not change: lists like
        `weights`."""
        ...

    def before_update(self, shards: Shards) -> None: ...

    def after_update(self, shards: Shards, steps: int) -> None:
        """`steps`: updates of the student so far, this one included."""
        ...


def _copied(
    weights: Sequence[torch.Tensor], dtype: torch.dtype | None, *, always: bool = False
) -> list[torch.Tensor]:
    """In this type; the same tensors where they have it, unless `always`. Page-locked where those
    are."""
    if not always and all(weight.dtype == dtype for weight in weights):
        return list(weights)
    like = [torch.empty_like(w, dtype=dtype or w.dtype, device="meta") for w in weights]
    if all(weight.is_pinned() for weight in weights):
        places = in_blocks(like, pin_memory=True)
    else:
        pairs = zip(like, weights, strict=True)
        places = [torch.empty_like(x, device=w.device) for x, w in pairs]
    return [place.copy_(weight) for place, weight in zip(places, weights, strict=True)]


class Averaged:
    """Exponential moving average."""

    def __init__(self, weights: Sequence[torch.Tensor], decay: float, interval: int) -> None:
        # float32: in bfloat16 a step of (1 − d) · difference is mostly lost in rounding.
        self._weights = _copied(weights, torch.float32)
        self._decay, self._interval = decay, interval

    def weights(self) -> Sequence[torch.Tensor]:
        return self._weights

    def tensors(self) -> Sequence[Sequence[torch.Tensor]]:
        return [self._weights]

    def before_update(self, shards: Shards) -> None:
        pass

    def after_update(self, shards: Shards, steps: int) -> None:
        if steps % self._interval:
            return
        for number, values in shards:
            weight = self._weights[number]
            if weight.device != values.device:  # in host memory
                values = values.to(weight.device)
            weight.mul_(self._decay).add_(values.float(), alpha=1 - self._decay)


class Lagged:
    """The student of some updates ago."""

    def __init__(self, weights: Sequence[torch.Tensor], count: int) -> None:
        more = (_copied(weights, None, always=True) for _ in range(count - 1))
        self._past = deque([weights, *more])
        """The oldest first."""

    def weights(self) -> Sequence[torch.Tensor]:
        return self._past[0]

    def tensors(self) -> Sequence[Sequence[torch.Tensor]]:
        return list(self._past)

    def before_update(self, shards: Shards) -> None:
        """The oldest one has scored all that it had to: what is about to be updated takes its
        memory."""
        oldest = self._past.popleft()
        for number, values in shards:
            oldest[number].copy_(values)
        self._past.append(oldest)

    def after_update(self, shards: Shards, steps: int) -> None:
        pass


def make_follower(teacher: TeacherConfig, weights: Sequence[torch.Tensor]) -> Follower | None:
    """None where the teacher is frozen. `weights`: with which it begins; they are its own now."""
    if teacher.ema_decay is not None:
        return Averaged(weights, teacher.ema_decay, teacher.ema_interval)
    if teacher.lag_steps is not None:
        return Lagged(weights, teacher.lag_steps)
    return None


class StudentWeights:
    """The student's, in the cut of a teacher of the same architecture."""

    def __init__(
        self,
        student: Sequence[CausalLM],
        student_context: ParallelContext,
        teacher: Sequence[CausalLM],
        teacher_context: ParallelContext,
        hf_path: str,
    ) -> None:
        """Collective over the student's ranks. `hf_path`: whose config.json both have."""
        self._student, self._teacher = student, teacher
        self._layout, self._hf_config = teacher_context.layout, read_hf_config(hf_path)
        alike = self._names(student) == self._names(teacher)
        self._exporter = None
        if not all(gather_everywhere(alike, student_context.cpu_group)):
            self._exporter = Exporter(
                student,
                self._hf_config,
                self._hf_config.vocab_size,
                student_context,
                BUCKET_BYTES,
            )

    @property
    def are_cut_alike(self) -> bool:
        return self._exporter is None

    def _names(self, chunks: Sequence[CausalLM]) -> list[tuple]:
        """What each parameter on this rank is."""
        found = []
        for chunk in chunks:
            weights = weights_of(chunk, self._hf_config)
            for name, parameter in chunk.named_parameters():
                weight = weights[name]
                ids = weight.layer, weight.expert, weight.num_local_experts
                found.append((name, *ids, tuple(parameter.shape)))
        return found

    def shards(self) -> Iterator[tuple[int, torch.Tensor]]:
        """As they are now. Collective over the student's ranks where the cuts differ, each of which
        must take all of it."""
        if self._exporter is None:
            parameters = (p for chunk in self._student for p in chunk.parameters())
            yield from enumerate(p.detach() for p in parameters)
            return
        for wholes in self._exporter.buckets_everywhere(dist.group.WORLD):
            yield from self._cut(wholes)

    def _cut(self, wholes: dict[str, torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """The shards of the parameters that these whole tensors make up."""
        number, heads = 0, head_shape(self._hf_config)
        for chunk in self._teacher:
            weights = weights_of(chunk, self._hf_config)
            for name, parameter in chunk.named_parameters():
                weight = weights[name]
                names = weight.hf_names(self._layout.ep_rank)
                if names[0] in wholes:
                    own = [wholes[each] for each in names]
                    values = torch.empty_like(parameter, dtype=own[0].dtype, device=own[0].device)
                    place, size = weight.place(self._layout)
                    fill_shard(values, weight.row.split, own, place, size, heads)
                    yield number, values
                number += 1
