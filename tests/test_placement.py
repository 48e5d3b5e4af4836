"""Where engines sit and which way the weights go, on hosts that this machine does not have."""

from pathlib import Path

import pytest

from megatron_eopd.config import Config, RolloutConfig, load_config
from megatron_eopd.errors import ConfigError
from megatron_eopd.parallel.init import check_gpus, own_gpu
from megatron_eopd.rollout.placement import (
    Seat,
    assumed_nodes,
    own_node,
    places_of,
    seats_of,
)
from megatron_eopd.weight_sync.route import routes

QUICKSTART = Path(__file__).parents[1] / "examples/quickstart/eopd.toml"


def rollout(tp: int = 1, **options) -> RolloutConfig:
    return RolloutConfig(tensor_model_parallel_size=tp, **options)


def config(*options: str) -> Config:
    return load_config(QUICKSTART, ["rollout.num_engines=none", *options])


def hosts(*sizes: int) -> list[int]:
    return [node for node, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize(
    "tp,nodes,expected",
    [
        (1, hosts(3), [(0,), (1,), (2,)]),
        (2, hosts(4), [(0, 1), (2, 3)]),
        (4, hosts(4, 8), [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]),
        (2, hosts(2, 4, 2), [(0, 1), (2, 3), (4, 5), (6, 7)]),
    ],
)
def test_neighbouring_ranks_of_a_host_own_an_engine(tp, nodes, expected):
    seats = seats_of(rollout(tp), range(len(nodes)), nodes)
    assert [seat.ranks for seat in seats] == expected
    assert [seat.number for seat in seats] == list(range(len(expected)))
    for seat in seats:
        assert seat.owner == seat.ranks[0]
        assert {nodes[rank] for rank in seat.ranks} == {seat.node}


def test_fewer_engines_sit_on_the_first_ranks():
    seats = seats_of(rollout(2, num_engines=2), range(8), hosts(4, 4))
    assert [seat.ranks for seat in seats] == [(0, 1), (2, 3)]


def test_asked_for_engines_may_leave_ranks_over():
    """On every host: 2 of 3 ranks, 4 of 5, and 1 of 1 stays without."""
    seats = seats_of(rollout(2, num_engines=3), range(9), hosts(3, 1, 5))
    assert [seat.ranks for seat in seats] == [(0, 1), (4, 5), (6, 7)]


@pytest.mark.parametrize(
    "options,nodes,message",
    [
        (
            {"tp": 2},
            hosts(3),
            r"rollout.tensor_model_parallel_size=2 does not divide the 3 ranks \(the student's\) "
            r"of host 0, on which engines sit. Set it to a divisor of 3, or rollout.num_engines",
        ),
        ({"tp": 4}, hosts(4, 2), r"=4 does not divide the 2 ranks .* of host 1, .*divisor of 2"),
        ({"tp": 4, "num_engines": 1}, hosts(2, 2), r"=4 does not divide the 2 ranks .* of host 0"),
        (
            {"tp": 2, "num_engines": 3},
            hosts(4),
            r"rollout.num_engines=3 engines of rollout.tensor_model_parallel_size=2 need 6 ranks, "
            r"each engine's on one host; 4 \(the student's\) hold 2. "
            r"Set rollout.num_engines to 2 or less, or start more ranks.",
        ),
        ({"tp": 2, "num_engines": 3}, hosts(3, 3), r"6 ranks.*; 6 .* hold 2. Set .* to 2 or less"),
        (
            {"tp": 2, "min_engines": 3},
            hosts(4),
            r"rollout.min_engines=3 is more than the 2 engines that the ranks hold. Set it to 2",
        ),
    ],
)
def test_ranks_that_do_not_hold_the_engines(options, nodes, message):
    """The message has the values, and what to set."""
    with pytest.raises(ConfigError, match=message):
        seats_of(rollout(**options), range(len(nodes)), nodes)


def test_of_separate_engines_the_message_counts_their_own_ranks():
    options = rollout(2, placement="separate", world_size=3)
    with pytest.raises(ConfigError, match=r"does not divide the 3 ranks \(3 own\) of host 0"):
        seats_of(options, range(1, 4), hosts(4))


def test_separate_engines_sit_behind_student_and_teachers():
    places = places_of(
        config(
            "teacher.placement=separate",
            "teacher.world_size=1",
            "rollout.placement=separate",
            "rollout.world_size=4",
            "rollout.tensor_model_parallel_size=2",
        ),
        hosts(7),
    )
    assert [seat.ranks for seat in places.seats] == [(3, 4), (5, 6)]
    assert places.seat_of(3) == Seat(0, (3, 4), 0) and places.seat_of(5) == places.seats[1]
    assert [places.seat_of(rank) for rank in (0, 1, 2, 4, 6)] == [None] * 5
    assert places.wire == (0, 3, 4, 5, 6), "all of them wait for rank 0, owners or not"
    assert places.devices_of(places.seats[1]) == [5, 6, 0, 1, 2, 3, 4]
    (route,) = places.routes
    assert route.hop == [0], "on one host nothing crosses the network"


def test_colocated_engines_on_two_hosts():
    places = places_of(
        config("rollout.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"),
        hosts(4, 4),
    )
    assert [seat.ranks for seat in places.seats] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert places.wire == (0, 2, 4, 6)
    assert places.devices_of(places.seats[0]) == [0, 1, 2, 3]
    assert places.devices_of(places.seats[3]) == [2, 3, 0, 1], "local numbers, its own first"
    first, second = places.routes
    assert (first.leader, dict(first.writers), first.hop) == (0, {0: 0, 1: 4}, [0, 4])
    assert (second.leader, dict(second.writers), second.hop) == (4, {0: 0, 1: 4}, [4, 0])


def test_separate_engines_on_two_hosts():
    """One of the owners of each host hands on, except where the leader itself is."""
    places = places_of(
        config("rollout.placement=separate", "rollout.world_size=6", "rollout.num_engines=5"),
        hosts(4, 4),
    )
    assert [seat.owner for seat in places.seats] == [2, 3, 4, 5, 6]
    assert places.wire == (0, 2, 3, 4, 5, 6, 7), "rank 7 owns none and waits all the same"
    (route,) = places.routes
    assert (route.leader, dict(route.writers), route.hop) == (0, {0: 0, 1: 4}, [0, 4])


@pytest.mark.parametrize(
    "nodes,leaders,owners",
    [
        (hosts(4), [0], [0, 1, 2, 3]),
        (hosts(8, 8), [0, 4, 8, 12], [0, 8]),
        (hosts(2, 2, 2, 2), [0, 4], [2, 4, 6]),
        (hosts(4, 4, 4), [0, 2, 4, 6], list(range(8, 12))),
        (hosts(1, 1), [0], [0]),
    ],
)
def test_a_bucket_crosses_the_network_once_for_each_host_with_engines(nodes, leaders, owners):
    with_engines = {nodes[owner] for owner in owners}
    for leader, route in zip(leaders, routes(leaders, nodes, owners), strict=True):
        assert set(route.writers) == with_engines, "each of them has one that writes its memory"
        assert all(nodes[rank] == node for node, rank in route.writers.items())
        assert route.writers.get(nodes[leader], leader) == leader, "it hands over there itself"
        assert route.hop[0] == leader and len(set(route.hop)) == len(route.hop)
        assert len(route.hop) - 1 == len(with_engines - {nodes[leader]})


def test_hosts_are_torchruns_or_have_eight_ranks(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("GROUP_RANK", raising=False)
    assert assumed_nodes(10) == hosts(8, 2) and own_node() == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_RANK", "3")
    assert assumed_nodes(5) == hosts(2, 2, 1) and own_node() == 3


def test_ranks_that_see_the_same_gpu_are_named():
    """Two hosts may have GPUs of the same number, never of the same name."""
    check_gpus(["", ""])
    check_gpus(["GPU-a", "GPU-b", "GPU-c"])
    with pytest.raises(ConfigError, match=r"ranks 1 and 3 have the same GPU, GPU-b: .* overlap"):
        check_gpus(["GPU-a", "GPU-b", "GPU-c", "GPU-b"])


def test_more_ranks_than_gpus_says_what_to_start(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(ConfigError, match=r"shows 2 \(CUDA_VISIBLE_DEVICES=4,5\).*per_node=2"):
        own_gpu()
