"""The way of the weights, as plain integers: which rank hands a stage's buckets to which engines.

A bucket crosses the network once for each host that has engines, to one rank there, and lies once
in that host's memory. The host of the stage's leader needs no crossing: the leader itself hands
over there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageRoute:
    """Of one pipeline stage. Ranks are those of the job."""

    leader: int
    writers: Mapping[int, int]
    """By node that has engines: the rank that puts the buckets into its memory."""

    @property
    def hop(self) -> list[int]:
        """The leader and those it sends to; the leader alone where nothing crosses the network."""
        return [self.leader, *(rank for rank in self.writers.values() if rank != self.leader)]


def routes(
    leaders: Sequence[int], nodes: Sequence[int], owners: Sequence[int]
) -> tuple[StageRoute, ...]:
    """One for each stage. `leaders`: of the stages, `nodes`: of every rank of the job, `owners`:
    the ranks that own engines, in their order."""
    agents: dict[int, int] = {}
    for owner in owners:
        agents.setdefault(nodes[owner], owner)
    return tuple(
        StageRoute(
            leader,
            {node: leader if node == nodes[leader] else agent for node, agent in agents.items()},
        )
        for leader in leaders
    )
