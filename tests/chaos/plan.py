"""Which faults, when. In: how many, and a seed. Out: a list that the same two always give.

Every fault and every moment of it comes before any comes again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from tests.chaos.faults import MOMENTS, Fault

ENGINE_SHARE = 0.2
"""Of the faults that need no engine, those that meet a run with one."""
RESTART_SHARE = 0.3
"""Of the starts, those that torchrun may bring back by itself."""


@dataclass(frozen=True)
class Planned:
    fault: Fault
    moment: str
    """A key of MOMENTS; empty for what is done between two starts."""
    delay_s: float
    """Behind the moment."""
    has_engine: bool
    """Whether the run samples with vLLM; else it replays recorded rollouts."""
    max_restarts: int
    """torchrun's, if a start begins with this fault."""
    seed: int
    """Of what the fault draws itself: which rank, which file, which bit."""


def make_plan(count: int, seed: int, faults: Sequence[Fault], *, engine: bool) -> list[Planned]:
    """`engine`: whether vLLM is there."""
    rng = Random(seed)
    return [_planned(fault, rng, engine) for fault in islice(_decks(faults, rng), count)]


def _decks(faults: Sequence[Fault], rng: Random) -> Iterator[Fault]:
    while True:
        yield from rng.sample(faults, len(faults))


def _planned(fault: Fault, rng: Random, engine: bool) -> Planned:
    moment = rng.choice(fault.moments) if fault.moments else ""
    delay_s = rng.uniform(0, MOMENTS[moment].longest_delay_s) if moment else 0.0
    chance = ENGINE_SHARE if engine and fault.may_meet_engine else 0.0
    return Planned(
        fault=fault,
        moment=moment,
        delay_s=delay_s,
        has_engine=fault.needs_engine or rng.random() < chance,
        max_restarts=2 if rng.random() < RESTART_SHARE else 0,
        seed=rng.randrange(2**32),
    )


def next_round(left: list[Planned], size: int) -> list[Planned]:
    """Faults for one run, taken out of `left`: all with an engine or all without, and those that
    wait for the export behind the others."""
    has_engine = left[0].has_engine
    chosen = [planned for planned in left if planned.has_engine == has_engine][:size]
    for planned in chosen:
        left.remove(planned)
    return sorted(chosen, key=lambda planned: planned.moment == "export")
