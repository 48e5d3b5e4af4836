"""Three training iterations, then a fourth without a weight sync. Prints, from rank 0, the largest
difference between the engine's and the trainer's log-probabilities after the third (in sync) and
after the fourth (not).

usage: torchrun … sync_after_steps.py CONFIG.toml section.key=value …
"""

import sys
from pathlib import Path

import torch

from megatron_eopd import launch, loop
from megatron_eopd.build import Session
from megatron_eopd.config import load_config
from megatron_eopd.rollout.megatron_engine import score_tokens
from megatron_eopd.unfinished import Unfinished
from tests.engine.toy import largest_difference, scores


def difference(session: Session) -> float:
    """Over random token ids: they touch weights that real text may leave alone."""
    generator = torch.Generator().manual_seed(session.config.seed)
    probes = torch.randint(session.vocab_size, (4, 16), generator=generator).tolist()
    ours = score_tokens(session.student.chunks, probes, session.vocab_size, session.context)
    found = scores(session.engine, probes)
    assert len(found) == len(session.engine._own.readers), "every engine serves"
    return max(largest_difference(engine, ours) for engine in found)


def train_once(session: Session, iteration: int) -> None:
    rollouts = loop.draw_rollouts(session, iteration)
    loop.optimize(
        session,
        rollouts,
        loop.plan_steps(session, rollouts),
        Unfinished(iteration, rollouts=rollouts),
        loop.stage_times(session, iteration),
    )


def compare(session: Session) -> None:
    session.push_weights(version=0)
    for iteration in range(3):
        train_once(session, iteration)
        session.push_weights(version=iteration + 1)
    in_sync = difference(session)
    train_once(session, 3)
    stale = difference(session)
    session.log.line(f"differences: {in_sync} {stale}")


if __name__ == "__main__":
    launch.on_every_rank(load_config(Path(sys.argv[1]), sys.argv[2:]), compare)
