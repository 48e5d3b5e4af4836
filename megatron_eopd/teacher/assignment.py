"""Which rank of a teacher scores what. Integers only, the same on every rank of both models."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_eopd.data.packing import Limits, PackedRollouts, num_tokens, pack_lengths
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import Rollout


@dataclass(frozen=True)
class Item:
    """A rollout and where the student's plan has put it."""

    rollout: Rollout
    dp_rank: int
    microbatch: int


def items_of(packed: PackedRollouts) -> list[Item]:
    """Of all data-parallel ranks, in the order of the plan."""
    return [
        Item(rollout, dp_rank, microbatch)
        for dp_rank, microbatches in enumerate(packed)
        for microbatch, rollouts in enumerate(microbatches)
        for rollout in rollouts
    ]


TeacherPlan = list[list[list[int]]]
"""[the teacher's data-parallel rank][microbatch] → items."""


def plan_by_length(items: Mapping[int, Item], limits: Limits, teacher: Layout) -> TeacherPlan:
    """Balanced anew, for a teacher with other data-parallel ranks than the student's."""
    numbers = list(items)
    lengths = [num_tokens(items[n].rollout) for n in numbers]
    packed = pack_lengths(lengths, limits, teacher)
    return [[[numbers[i] for i in batch] for batch in rank] for rank in packed]


def plan_as_student(items: Mapping[int, Item], dp: int) -> TeacherPlan:
    """The student's own microbatches, for a teacher with its layout: every score is where it is
    needed."""
    count = 1 + max(item.microbatch for item in items.values())
    plan: TeacherPlan = [[[] for _ in range(count)] for _ in range(dp)]
    for n, item in items.items():
        plan[item.dp_rank][item.microbatch].append(n)
    return plan


def owners_of(plan: TeacherPlan) -> dict[int, int]:
    """Item → the data-parallel rank of the teacher that scores it."""
    return {n: rank for rank, batches in enumerate(plan) for batch in batches for n in batch}
