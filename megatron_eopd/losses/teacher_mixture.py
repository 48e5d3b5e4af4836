"""Several teachers' distributions of the same tokens as one. In: vocab-parallel logits of each.
Out: logits whose softmax is their mean by weight.

    p(v) = Σ_i w_i · p_i(v) / Σ_i w_i,   over the teachers i that speak of the token
"""
# Shapes: N tokens, M those of one teacher, V this rank's columns of the vocabulary, E teachers.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_eopd.losses.kernels.eager import row_chunks


@dataclass(frozen=True)
class Spoken:
    """What one teacher says."""

    weight: float
    runs: tuple[range, ...]
    """Which of the N tokens its M are, rising."""
    logits_MV: torch.Tensor


def mixed_logits(
    teachers: Sequence[Spoken],
    num_tokens: int,
    *,
    num_columns: int,
    temperature: float,
    tp_group: dist.ProcessGroup,
) -> torch.Tensor:
    """[N, V] float32, without gradient: T · log p, so that divided by the temperature T and
    normalised it is p again. Every token must have a teacher.

    `num_columns`: of this rank that are real tokens; what is behind them is padding, and −∞ here.
    Forward: two all-reduces of a number for each teacher's token.
    """
    with torch.no_grad():
        log_z = _log_partitions(teachers, num_columns, temperature, tp_group)
        totals_N = _totals(teachers, num_tokens)
        like = teachers[0].logits_MV
        mixed_NV = like.new_full((num_tokens, like.shape[-1]), -math.inf, dtype=torch.float32)
        for spoken, log_z_M in zip(teachers, log_z, strict=True):
            first = 0
            for run in spoken.runs:
                for rows in row_chunks(like[: len(run)]):
                    own = slice(first + rows.start, first + min(rows.stop, len(run)))
                    here = slice(run.start + rows.start, run.start + min(rows.stop, len(run)))
                    shift_C = math.log(spoken.weight) - totals_N[here].log() - log_z_M[own]
                    logits_CV = spoken.logits_MV[own, :num_columns].float() / temperature
                    part_CV = mixed_NV[here, :num_columns]
                    part_CV.copy_(torch.logaddexp(part_CV, logits_CV + shift_C.unsqueeze(-1)))
                first += len(run)
        return mixed_NV.mul_(temperature)


def _log_partitions(
    teachers: Sequence[Spoken], num_columns: int, temperature: float, tp_group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """log Σ_v exp(logit / T) over the vocabulary of all ranks, [M] of each teacher."""
    sizes = [len(spoken.logits_MV) for spoken in teachers]
    maxima, sums = [], []
    for spoken in teachers:
        maximum_M = spoken.logits_MV.new_full((len(spoken.logits_MV),), -math.inf).float()
        if num_columns:  # a shard of padding alone has no maximum
            maximum_M = spoken.logits_MV[:, :num_columns].amax(-1).float() / temperature
        maxima.append(maximum_M)
    maximum = torch.cat(maxima)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=tp_group)
    for spoken, maximum_M in zip(teachers, maximum.split(sizes), strict=True):
        sum_M = torch.zeros_like(maximum_M)
        real_MV = spoken.logits_MV[:, :num_columns]
        for rows in row_chunks(real_MV):
            own_CV = real_MV[rows].float() / temperature - maximum_M[rows].unsqueeze(-1)
            sum_M[rows] = own_CV.exp().sum(-1)
        sums.append(sum_M)
    total = torch.cat(sums)
    dist.all_reduce(total, group=tp_group)
    return list((maximum + total.log()).split(sizes))


def _totals(teachers: Sequence[Spoken], num_tokens: int) -> torch.Tensor:
    """Sum of the weights of each token's teachers, float32 [N]."""
    totals_N = teachers[0].logits_MV.new_zeros(num_tokens, dtype=torch.float32)
    for spoken in teachers:
        for run in spoken.runs:
            totals_N[run.start : run.stop] += spoken.weight
    return totals_N
