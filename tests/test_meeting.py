"""Ranks that meet on a store which earlier starts of the job have used."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from megatron_eopd.errors import LostRankError
from megatron_eopd.parallel.meeting import fresh_part

TIMEOUT = timedelta(seconds=5)


def meet(store: Store, ranks: list[int], world_size: int, timeout: timedelta = TIMEOUT) -> list:
    """The parts that these ranks get, or their errors."""

    def come(rank: int) -> Store | Exception:
        try:
            return fresh_part(store, rank, world_size, timeout)
        except LostRankError as error:
            return error

    store.set_timeout(timeout)
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(come, ranks))


def test_all_ranks_get_the_same_part_and_every_start_another():
    store = HashStore()
    for start in range(3):
        parts = meet(store, [0, 1, 2], 3)
        assert not any(part.check(["address"]) for part in parts)
        parts[0].set("address", str(start))
        assert [part.get("address") for part in parts] == [str(start).encode()] * 3


@pytest.mark.parametrize("came", [[0, 1], [1, 2], [2]])
def test_a_start_that_not_all_ranks_have_lived_to_see_leaves_nothing_behind(came):
    """They die while they wait for the others; each rank has then come a number of times of its
    own, and every one of the next start still gets the same part."""
    store = HashStore()
    errors = meet(store, came, 3, timedelta(seconds=0.2))
    assert all(isinstance(error, LostRankError | Store) for error in errors)
    parts = meet(store, [0, 1, 2], 3)
    parts[1].set("address", "here")
    assert [part.get("address") for part in parts] == [b"here"] * 3


def test_the_ranks_that_have_not_come_are_named():
    (error, _) = meet(HashStore(), [0, 2], 4, timedelta(seconds=0.2))
    assert "ranks [1, 3] did not come within" in str(error)
    (error,) = meet(HashStore(), [1], 2, timedelta(seconds=0.2))
    assert "rank 0 did not come within" in str(error)


def test_rank_zero_may_come_last():
    """Until then the others find what an earlier start has left, and do not take it for theirs."""
    store = HashStore()
    meet(store, [0, 1], 2)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(fresh_part, store, 1, 2, TIMEOUT)
        time.sleep(0.1)
        parts = [fresh_part(store, 0, 2, TIMEOUT), first.result()]
    parts[0].set("address", "here")
    assert parts[1].check(["address"])
