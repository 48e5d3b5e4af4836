"""A vocabulary that is cut over tensor-parallel ranks, and how numbers per shard become numbers."""
# Shapes: N tokens, R tensor-parallel ranks (or shards of any other kind), K some tokens.

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Vocabulary:
    """How the logits are cut, and what they are divided by."""

    first_column: int
    """Token id of this rank's first column."""
    num_columns: int
    """Columns of this rank that are real tokens; they come first, padding behind them."""
    tp_group: dist.ProcessGroup | None
    temperatures: tuple[float, float]
    """The student's and the teacher's."""

    def columns_of(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(columns, owned): where this rank has the tokens, column 0 for those it has not."""
        columns = token_ids - self.first_column
        owned = (columns >= 0) & (columns < self.num_columns)
        return columns.where(owned, 0), owned


class LogPartition(NamedTuple):
    """log p(v) = (x_v − max) / temperature − log_z. Each float32 [N], without gradient."""

    student_max: torch.Tensor
    teacher_max: torch.Tensor
    student_log_z: torch.Tensor
    teacher_log_z: torch.Tensor

    def logprobs(self, who: int, logits_NK: torch.Tensor, temperature: float) -> torch.Tensor:
        """Of the student (who = 0) or the teacher (1), in nats, float32."""
        maximum, log_z = self[who].unsqueeze(-1), self[who + 2].unsqueeze(-1)
        return (logits_NK.float() - maximum) / temperature - log_z


def all_gather(own: torch.Tensor, tp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """[R, ...]: every rank's tensor, on every rank."""
    if tp_group is None:
        return own.unsqueeze(0)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(gathered, own.contiguous(), group=tp_group)
    return torch.stack(gathered)


def merge_shards(sums_RN8: torch.Tensor, temperatures: tuple[float, float]) -> torch.Tensor:
    """[N, 8]: the sums (see kernels/) of all shards together, relative to the maxima of all.

    Sums of a shard whose maximum lies δ below (divided by the temperature) shrink by exp(δ), and
    every s or t in them moves by δ.
    """
    m_s, m_t, z_s, z_t, d_s, d_t, a_t, a_s = sums_RN8.unbind(-1)
    max_s, max_t = m_s.amax(0), m_t.amax(0)
    shift_s, shift_t = (m_s - max_s) / temperatures[0], (m_t - max_t) / temperatures[1]
    scale_s, scale_t = shift_s.exp(), shift_t.exp()
    sums = (
        scale_s * z_s,
        scale_t * z_t,
        scale_s * (d_s + z_s * (shift_s - shift_t)),
        scale_t * (d_t + z_t * (shift_s - shift_t)),
        scale_t * (a_t + z_t * shift_t),
        scale_s * (a_s + z_s * shift_s),
    )
    return torch.stack([max_s, max_t, *(x.sum(0) for x in sums)], dim=-1)
