"""One outcome on all ranks, whoever failed."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_eopd.errors import (
    CheckpointError,
    EngineError,
    Interrupted,
    LostRankError,
    RemoteError,
)
from megatron_eopd.models.mcore_files import loading_errors
from megatron_eopd.parallel.collectives import (
    collecting,
    from_rank_zero,
    naming_stage,
    raise_together,
)
from tests.ranks import run_ranks


def check_all_outcomes() -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    calls = []
    answer = from_rank_zero(lambda: calls.append(rank) or {"tokens": (1, 2)}, group)
    assert answer == {"tokens": (1, 2)} and calls == ([0] if rank == 0 else [])

    def die() -> None:
        raise EngineError("vLLM died")

    with pytest.raises(EngineError, match=r"^vLLM died$"):
        from_rank_zero(die, group)

    def leave() -> None:
        raise Interrupted("stopped by SIGTERM")

    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$"):
        from_rank_zero(leave, group)

    expected = ZeroDivisionError if rank == 0 else RemoteError
    with pytest.raises(expected, match="by zero"):
        from_rank_zero(lambda: 1 // 0, group)

    raise_together([], group)
    errors: list[Exception] = []
    with collecting(errors):
        pass
    with collecting(errors):
        raise EngineError("engine late")
    assert len(errors) == 1
    with pytest.raises(EngineError, match="stage leader 1 is late"):
        raise_together([EngineError("stage leader 1 is late")] if rank == 1 else [], group)
    with pytest.raises(RemoteError, match="ValueError: bad 0\nValueError: bad 1"):
        raise_together([ValueError(f"bad {rank}")], group)

    # A group whose rank 0 is not global rank 0.
    reverse = dist.new_group([1, 2], backend="gloo")
    if rank > 0:
        assert from_rank_zero(lambda: rank, reverse) == 1


def test_every_rank_has_the_same_outcome(tmp_path):
    run_ranks(3, tmp_path, check_all_outcomes)


def check_late():
    if dist.get_rank() == 1:
        time.sleep(4)
        return
    stage = "stage train of iteration 3 on rank 0"
    with pytest.raises(LostRankError, match=f"noticed in {stage}"), naming_stage(stage):
        dist.all_reduce(torch.zeros(1))


def test_a_rank_that_hangs_is_noticed_within_the_time_out(tmp_path):
    """By the others, who say in which stage; here the time-out is a second."""
    begin = time.monotonic()
    run_ranks(2, tmp_path, check_late, timeout_s=1)
    assert time.monotonic() - begin < 30


def test_errors_of_our_own_keep_their_name():
    """A value error in a stage is no lost rank, whatever its words."""
    with pytest.raises(ValueError, match="timed out"), naming_stage("stage x"):
        raise ValueError("timed out")


def check_late_loading() -> None:
    if dist.get_rank() == 1:
        time.sleep(4)
        return
    loading = "noticed in loading checkpoints/000010"
    with pytest.raises(LostRankError, match=loading), loading_errors(Path("checkpoints/000010")):
        dist.all_reduce(torch.zeros(1))


def test_a_rank_lost_while_loading_is_no_damaged_checkpoint(tmp_path):
    """Who reads "damaged" may delete a good one; what is damaged is still called so."""
    run_ranks(2, tmp_path, check_late_loading, timeout_s=1)
    with pytest.raises(CheckpointError, match="damaged"), loading_errors(tmp_path):
        raise RuntimeError("PytorchStreamReader failed reading zip archive")
