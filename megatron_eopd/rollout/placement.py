"""Where engines sit, as plain integers. In: options, and which rank is on which host. Out: seats.

Each group of `rollout.tensor_model_parallel_size` neighbouring ranks of a host owns one engine: its
workers use these ranks' devices, and its process is a child of the first of them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eopd.config import Config, RolloutConfig
from megatron_eopd.errors import ConfigError
from megatron_eopd.parallel.worlds import ENGINES, STUDENT, roles_of, student_layout
from megatron_eopd.weight_sync.route import StageRoute, routes

USUAL_RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Seat:
    """Of one engine. Ranks are those of the job."""

    number: int
    ranks: tuple[int, ...]
    node: int

    @property
    def owner(self) -> int:
        return self.ranks[0]


def seats_of(rollout: RolloutConfig, ranks: Sequence[int], nodes: Sequence[int]) -> list[Seat]:
    """`ranks`: those that engines may use, the student's or their own; `nodes`: of every rank of
    the job.

    Raises:
        ConfigError: they do not hold the engines that are asked for.
    """
    size, asked = rollout.tensor_model_parallel_size, rollout.num_engines
    whose = "the student's" if rollout.placement == "colocated" else f"{rollout.world_size} own"
    groups: list[tuple[int, ...]] = []
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank], []).append(rank)
    none_fits = all(len(local) < size for local in by_node.values())
    for node, local in sorted(by_node.items()):
        if len(local) % size and (asked is None or none_fits):
            raise ConfigError(
                f"rollout.tensor_model_parallel_size={size} does not divide the {len(local)} ranks "
                f"({whose}) of host {node}, on which engines sit. Set it to a divisor of "
                f"{len(local)}, or rollout.num_engines to the engines that fit."
            )
        groups += [tuple(local[n : n + size]) for n in range(0, len(local) - size + 1, size)]
    if asked is not None and asked > len(groups):
        raise ConfigError(
            f"rollout.num_engines={asked} engines of rollout.tensor_model_parallel_size={size} "
            f"need {asked * size} ranks, each engine's on one host; {len(ranks)} ({whose}) hold "
            f"{len(groups)}. Set rollout.num_engines to {len(groups)} or less, or start more ranks."
        )
    count = len(groups) if asked is None else asked
    if count < rollout.min_engines:
        raise ConfigError(
            f"rollout.min_engines={rollout.min_engines} is more than the {count} engines that the "
            f"ranks hold. Set it to {count} or less."
        )
    return [Seat(n, group, nodes[group[0]]) for n, group in enumerate(groups[:count])]


@dataclass(frozen=True)
class Places:
    """Engines and the way of the weights, in one job."""

    nodes: tuple[int, ...]
    """The number of the host of every rank of the job."""
    seats: tuple[Seat, ...]
    routes: tuple[StageRoute, ...]
    """By pipeline stage of the student."""
    wire: tuple[int, ...]
    """The ranks that rank 0 leads, behind itself; rank 0 alone where it leads only its own."""

    def seat_of(self, owner: int) -> Seat | None:
        """Of the engine that this rank owns."""
        return next((seat for seat in self.seats if seat.owner == owner), None)

    def describe(self) -> dict[int, str]:
        """By rank of the job, which engine it has a part in."""
        return {rank: f"engine {seat.number}" for seat in self.seats for rank in seat.ranks}

    def devices_of(self, seat: Seat) -> list[int]:
        """The local ranks of a seat, and behind them the others of its host: a worker reads weights
        where they lie, on any GPU of the host."""
        host = [rank for rank, node in enumerate(self.nodes) if node == seat.node]
        local = {rank: index for index, rank in enumerate(host)}
        return [local[r] for r in (*seat.ranks, *(r for r in host if r not in seat.ranks))]


def ranks_for_engines(config: Config, world_size: int) -> range:
    """Of the job: the student's, or their own."""
    roles = roles_of(config, world_size)
    role = roles[ENGINES if config.rollout.placement == "separate" else STUDENT]
    return range(role.first_rank, role.first_rank + role.size)


def places_of(config: Config, nodes: Sequence[int]) -> Places:
    """
    Raises:
        ConfigError: see `seats_of`.
    """
    ranks = ranks_for_engines(config, len(nodes))
    seats = seats_of(config.rollout, ranks, nodes)
    layout = student_layout(config, len(nodes))
    leaders = [stage * layout.stage_size for stage in range(layout.pp)]
    owners = [seat.owner for seat in seats]
    led = owners if config.rollout.placement == "colocated" else list(ranks)
    return Places(
        nodes=tuple(nodes),
        seats=tuple(seats),
        routes=routes(leaders, nodes, owners),
        wire=(0, *(rank for rank in led if rank != 0)),
    )


def assumed_nodes(world_size: int) -> list[int]:
    """As torchrun says of this host, and otherwise hosts of eight ranks."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or USUAL_RANKS_PER_NODE
    return [rank // per_node for rank in range(world_size)]


def own_node() -> int:
    """The number of this rank's host, by torchrun."""
    return int(os.environ.get("GROUP_RANK", 0))
