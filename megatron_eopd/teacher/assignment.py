"""Which rank of a teacher scores what. Integers only, the same on every rank of both models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_eopd.data.packing import Limits, PackedRollouts, num_tokens, pack_lengths
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import Rollout


@dataclass(frozen=True)
class Item:
    """A rollout and where the student's plan has put it."""

    rollout: Rollout
    dp_rank: int
    microbatch: int
    read: Rollout
    """The same response behind the prompt that the teacher reads."""


def items_of(packed: PackedRollouts) -> list[Item]:
    """Of all data-parallel ranks, in the order of the plan."""
    return [
        Item(rollout, dp_rank, microbatch, rollout)
        for dp_rank, microbatches in enumerate(packed)
        for microbatch, rollouts in enumerate(microbatches)
        for rollout in rollouts
    ]


def as_read(items: Mapping[int, Item], teacher: str) -> dict[int, Item]:
    """The same, with the prompts that this teacher reads."""
    return {n: replace(item, read=item.rollout.read_by(teacher)) for n, item in items.items()}


TeacherPlan = list[list[list[int]]]
"""[the teacher's data-parallel rank][microbatch] → items."""


def plan_by_length(items: Mapping[int, Item], limits: Limits, teacher: Layout) -> TeacherPlan:
    """Balanced anew, for a teacher with other data-parallel ranks than the student's."""
    numbers = list(items)
    lengths = [num_tokens(items[n].read) for n in numbers]
    packed = pack_lengths(lengths, limits, teacher)
    return [[[numbers[i] for i in batch] for batch in rank] for rank in packed]


def plan_locally(items: Mapping[int, Item], limits: Limits, layout: Layout) -> TeacherPlan:
    """For a teacher with the student's layout: every score is where it is needed. The student's own
    microbatches, unless other prompts would make them longer than a budget of tokens allows."""
    is_alike = all(num_tokens(item.read) == num_tokens(item.rollout) for item in items.values())
    if is_alike or limits.max_tokens is None:
        return plan_as_student(items, layout.dp)
    alone = replace(layout, dp=1, rank=0)
    plan: TeacherPlan = []
    for dp_rank in range(layout.dp):
        own = {n: item for n, item in items.items() if item.dp_rank == dp_rank}
        plan += plan_by_length(own, limits, alone) if own else [[]]
    # Ranks that share experts work on as many microbatches.
    count = max(map(len, plan))
    return [batches + [[] for _ in range(count - len(batches))] for batches in plan]


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
