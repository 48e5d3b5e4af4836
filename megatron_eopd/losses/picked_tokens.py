"""Single tokens that ride along with the sweep: the sampled one and the top k.

A rank's own candidates for the top k are tokens of its own columns, so it holds both models' logits
of them, and the k best of all ranks' candidates are the top k of the whole vocabulary. What the
ranks exchange is [N, 2 + 3·k] float32 beside the eight sums, in the same all-gather.
"""
# Shapes: N tokens, K candidates or picked tokens, W floats that travel, R tensor-parallel ranks.

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from megatron_eopd.losses.kernels import LOWEST
from megatron_eopd.losses.shards import LogPartition, Vocabulary
from megatron_eopd.losses.top_k import top_k_of_rows

Support = Literal["teacher", "student", "union"]

STUDENT, TEACHER = 0, 1
RANKED_BY = {"teacher": (TEACHER,), "student": (STUDENT,), "union": (TEACHER, STUDENT)}

MOST_IDS = 1 << 24
"""Token ids travel as float32, which holds integers up to here exactly."""


@dataclass(frozen=True)
class Pick:
    """Which tokens are asked for."""

    sampled_ids_N: torch.Tensor | None
    """int64, ids of the whole vocabulary."""
    top_k: int
    support: Support

    @property
    def rankings(self) -> tuple[int, ...]:
        """Whose top k: TEACHER, STUDENT or both."""
        return RANKED_BY[self.support] if self.top_k else ()


class PickedTokens(NamedTuple):
    """Log-probabilities over the full vocabulary, in nats, float32, at the two temperatures.

    The student's are differentiable in its logits.
    """

    sampled_student_logprobs: torch.Tensor | None
    """[...]; −inf of an id that is no token."""
    sampled_teacher_logprobs: torch.Tensor | None
    top_ids: torch.Tensor
    """int64 [..., K], the most probable first; with `union` the teacher's k, then the student's.
    Zero columns when no top k was asked for."""
    top_student_logprobs: torch.Tensor
    top_teacher_logprobs: torch.Tensor
    top_valid: torch.Tensor
    """bool [..., K]: False for a token that is there already, or that has no probability."""

    @staticmethod
    def from_columns(
        columns: tuple[torch.Tensor, ...], has_sampled: bool, shape: torch.Size
    ) -> "PickedTokens":
        """From ids, student and teacher log-probabilities and validity, each [N, K]."""
        ids, student, teacher, valid = (x.view(*shape, x.shape[-1]) for x in columns)
        top = tuple(x[..., int(has_sampled) :] for x in (ids, student, teacher, valid))
        if not has_sampled:
            return PickedTokens(None, None, *top)
        return PickedTokens(student[..., 0], teacher[..., 0], *top)


def pack_candidates(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    vocabulary: Vocabulary,
    teachers_top: tuple[torch.Tensor, torch.Tensor] | None,
    pick: Pick,
) -> torch.Tensor:
    """[N, W] float32: this rank's logits of the tokens asked for, not yet divided by anything.

    First the sampled token's two logits, LOWEST where another rank owns it; then for each ranking
    the student's logits, the teacher's and the token ids of its k candidates.

    `teachers_top`: largest logits and columns of this shard, as in ShardSums; needed where the pick
    ranks by the teacher.
    """
    assert vocabulary.first_column + vocabulary.num_columns < MOST_IDS, vocabulary
    logits = (student_NV, teacher_NV)
    parts = [student_NV.new_empty((len(student_NV), 0), dtype=torch.float32)]
    if pick.sampled_ids_N is not None:
        columns_N1, owned_N1 = vocabulary.columns_of(pick.sampled_ids_N.unsqueeze(-1))
        parts += [logits_at(x, columns_N1).where(owned_N1, LOWEST) for x in logits]
    for ranked_by in pick.rankings:
        if ranked_by == STUDENT:
            real_NV = student_NV[:, : vocabulary.num_columns]
            values_NK, columns_NK = top_k_of_rows(real_NV, pick.top_k)
        else:
            values_NK, columns_NK = teachers_top
        # A shard with fewer than k finite logits names column 0 in place of each missing one.
        there_NK = values_NK > LOWEST
        parts += [logits_at(x, columns_NK).where(there_NK, LOWEST) for x in logits]
        parts.append((columns_NK + vocabulary.first_column).float())
    return torch.cat(parts, dim=-1)


def logits_at(logits_NV: torch.Tensor, columns_NK: torch.Tensor) -> torch.Tensor:
    if not logits_NV.shape[-1]:
        return torch.full_like(columns_NK, LOWEST, dtype=torch.float32)
    return logits_NV.gather(-1, columns_NK).float().clamp(min=LOWEST)


def choose_tokens(
    gathered_RNW: torch.Tensor, pick: Pick, log_z: LogPartition, temperatures: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, student and teacher log-probabilities, validity), each [N, K]; the sampled token first.

    From every rank's packed candidates; the same on every rank.
    """
    num_sampled = 2 if pick.sampled_ids_N is not None else 0
    sizes = [num_sampled, *(3 * pick.top_k for _ in pick.rankings)]
    sampled_RN2, *rankings = gathered_RNW.split(sizes, dim=-1)
    found = [
        _best_of_all_ranks(x, pick.top_k, r) for x, r in zip(rankings, pick.rankings, strict=True)
    ]
    if len(found) == 2:  # the student's top k, without what the teacher's has already
        (teachers_ids, _, in_use), (ids, logits, valid) = found
        known = (ids.unsqueeze(-1) == teachers_ids.unsqueeze(-2)) & in_use.unsqueeze(-2)
        found[1] = (ids, logits, valid & ~known.any(-1))
    if num_sampled:
        # One rank owns the token, and LOWEST is what the others say.
        sampled_2N1 = sampled_RN2.amax(0).T.unsqueeze(-1)
        ids_N1 = pick.sampled_ids_N.unsqueeze(-1)
        found.insert(0, (ids_N1, sampled_2N1, torch.ones_like(ids_N1, dtype=torch.bool)))
    if not found:
        none = gathered_RNW.new_empty((gathered_RNW.shape[1], 0))
        return none.long(), none, none, none.bool()
    ids, logits, valid = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    student, teacher = (
        log_z.logprobs(who, logits[who], temperatures[who]) for who in (STUDENT, TEACHER)
    )
    return ids, student, teacher, valid


def _best_of_all_ranks(
    gathered_RNW: torch.Tensor, top_k: int, ranked_by: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [N, K], logits of student and teacher [2, N, K], validity [N, K]."""
    # [3, N, R·k]. Ranks hold rising ids and each lists equal logits by id, so here too the lowest
    # id wins a tie.
    candidates = gathered_RNW.unflatten(-1, (3, top_k)).permute(2, 1, 0, 3).flatten(-2)
    values_NK, best_NK = top_k_of_rows(candidates[ranked_by], top_k)
    logits = torch.stack([x.gather(-1, best_NK) for x in candidates[:2]])
    # Where fewer than k tokens have a finite logit, the first candidate stands for each missing
    # one, and its own logit would say that it is there.
    return candidates[2].gather(-1, best_NK).long(), logits, values_NK > LOWEST
