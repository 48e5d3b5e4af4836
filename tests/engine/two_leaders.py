"""One of two trainer ranks, each the leader of a pipeline stage; started by test_vllm_engine.

Its export is as hostile as an export may be: every bucket comes after a collective of both ranks,
and the stages take turns, so that one leader is always in a collective while the other sends.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_eopd.errors import EngineError, RemoteError
from megatron_eopd.records import Rollout
from megatron_eopd.rollout.engine import Sampling
from tests.engine.toy import PROBES, ToyTrainer, largest_difference, make_prompts, scores

TIMEOUT_S = 15


def export(trainer: ToyTrainer, order: str, fail_on_rank: int = -1) -> Iterator[list[torch.Tensor]]:
    rank = dist.get_rank()
    sizes = [len(stage) for stage in trainer.stages]
    turns = [(stage, i) for stage in range(2) for i in range(sizes[stage])]
    if order == "last stage first":
        turns.sort(key=lambda turn: -turn[0])
    if order == "alternating":
        turns.sort(key=lambda turn: turn[1])
    own = list(trainer.export(rank))
    for stage, i in turns:
        dist.all_reduce(torch.ones(1))
        if stage != rank:
            yield []
        elif rank == fail_on_rank and i == 1:
            yield [tensor.double() for tensor in own[i]]
        else:
            yield own[i]


def refuse(number: int, rollout: Rollout) -> None:
    raise OSError("no place for a response")


def main() -> None:
    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="env://")
    rank = dist.get_rank()
    trainer = ToyTrainer(path / "model", num_stages=2)
    exports = []
    engine = trainer.start_engine(
        path / "log" / "engine.txt",
        sync_timeout_s=TIMEOUT_S,
        export=lambda: exports[-1],
    )
    orders = ["first stage first", "last stage first", "alternating"]
    for version, order in enumerate(orders):
        trainer.train(seed=version)
        exports.append(export(trainer, order))
        engine.update_weights(version)
        (found,) = scores(engine, PROBES)
        assert largest_difference(found, trainer.probes()) < 1e-4, order

    told = {}
    rollouts = engine.generate(make_prompts(4), Sampling(2, 1.0, 8, (11,), 7), told.setdefault)
    both: list = [None, None]
    dist.all_gather_object(both, rollouts)
    assert both[0] == both[1] and len(rollouts) == 8
    assert told == (dict(enumerate(rollouts)) if rank == 0 else {})

    for failing in (0, 1):
        exports.append(export(trainer, "alternating", fail_on_rank=failing))
        begin = time.monotonic()
        try:
            engine.update_weights(10)
        except EngineError as error:
            assert "torch.float64" in str(error), error
        else:
            raise AssertionError(f"a wrong tensor of stage {failing} went unnoticed")
        assert time.monotonic() - begin < TIMEOUT_S, "released by the deadline alone"
        exports.append(export(trainer, "alternating"))
        engine.update_weights(11)
        (found,) = scores(engine, PROBES)
        assert largest_difference(found, trainer.probes()) < 1e-4

    try:
        engine.generate(make_prompts(4), Sampling(2, 1.0, 8, (11,), 7), refuse)
    except (OSError, RemoteError) as error:
        assert isinstance(error, OSError if rank == 0 else RemoteError)
        assert "no place for a response" in str(error)
    else:
        raise AssertionError("what hears of the responses raised, and generate did not")
    engine.close()
    dist.destroy_process_group()
    print("all checks passed", flush=True)


if __name__ == "__main__":
    main()
