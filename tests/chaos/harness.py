"""A toy run under faults, started again and again until it has finished. In: a plan. Out: outcomes.

How faults are made is in faults.py, what must hold in judge.py.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psutil

from tests.chaos.faults import BALLAST, MOMENTS, pick_file
from tests.chaos.judge import judge_result, judge_start, look, warnings_of
from tests.chaos.plan import Planned
from tests.chaos.start import Start

START_LIMIT_S = 400.0
"""Within which a start has met its fault or ended."""
GONE_S = 15.0
"""Within which all processes are gone after torchrun, those that were still importing included."""


@dataclass
class Outcome:
    fault: str
    did: str
    """What was done to what, and when."""
    said: str = ""
    came_back: str = ""
    """By whom the run was brought back."""
    seconds: float = 0.0
    """From the fault until nothing of the start was left, or it went on."""
    problems: list[str] = field(default_factory=list)


@dataclass
class Round:
    """One run under some of the faults."""

    run_dir: Path
    undisturbed: Path
    options: list[str]
    damaged_kinds: Counter[str]
    """Kinds of files that were damaged, in all rounds."""
    damaged: set[Path] = field(default_factory=set)
    """Checkpoints that are complete and were damaged."""
    starts: int = 0

    def work(self, faults: list[Planned], tell: Callable[[Outcome], None]) -> bool:
        """Takes out of `faults` what the run met before it finished, or did not keep a promise.
        Returns whether it kept them all."""
        while True:
            outcomes, code = self._one_start(faults)
            for outcome in outcomes:
                tell(outcome)
            if any(outcome.problems for outcome in outcomes):
                return False
            # A finished run's checkpoint can still be damaged, and what it held be made again.
            if code == 0 and not any(planned.fault.damage for planned in faults):
                return True

    def _one_start(self, faults: list[Planned]) -> tuple[list[Outcome], int | None]:
        """Outcomes, and torchrun's exit code."""
        damage = self._damage(faults)
        before = look(self.run_dir, self.damaged)
        start = self._start(faults)
        try:
            met = self._meet(start, faults)
            code = start.torchrun.poll()
            problems = [*judge_start(start, before, self.damaged), *self._leftovers(start)]
        finally:
            start.kill()
        (self.run_dir / BALLAST).unlink(missing_ok=True)
        self.damaged -= {path for path in self.damaged if start.has_written(path)}
        if code == 0:
            problems += judge_result(self.run_dir, self.undisturbed)
        elif all(outcome.came_back == "went on" for outcome in met):
            problems.append(f"ended with code {code} by itself: {start.said()}")
        if damage:
            damage[0].said = warnings_of(start) or start.said()
        outcomes = [*damage, *met]
        if problems and not outcomes:
            outcomes = [Outcome("none", "an undisturbed start")]
        if problems:
            outcomes[-1].problems += problems
        return outcomes, code

    def _start(self, faults: list[Planned]) -> Start:
        self.starts += 1
        output = self.run_dir.with_name(f"{self.run_dir.name}-start{self.starts}.txt")
        due = next((planned for planned in faults if planned.fault.act), None)
        return Start(self.run_dir, self.options, due.max_restarts if due else 0, output)

    def _damage(self, faults: list[Planned]) -> list[Outcome]:
        """Of at most one file, if that is due and another sound checkpoint stands behind."""
        sound = look(self.run_dir, self.damaged).sound
        due = next((planned for planned in faults if planned.fault.damage), None)
        if due is None or len(sound) < 2:
            return []
        faults.remove(due)
        rng, newest = Random(due.seed), sound[-1]
        path = pick_file(newest, self.damaged_kinds, rng, with_bytes=due.fault.needs_bytes)
        did = due.fault.damage(path, rng)
        if (newest / "DONE").exists():  # without it a checkpoint does not count
            self.damaged.add(newest)
        return [Outcome(due.fault.name, f"{path.name} of {newest.name}: {did}", "", "same command")]

    def _meet(self, start: Start, faults: list[Planned]) -> list[Outcome]:
        """Faults one after the other, as long as the start lives; it has ended then."""
        outcomes: list[Outcome] = []
        while not start.has_ended():
            due = next((planned for planned in faults if planned.fault.act), None)
            did = inject(start, due) if due else ""
            if not did:
                if not wait(start.has_ended, START_LIMIT_S):
                    outcomes.append(Outcome("none", "hangs", problems=["does not end"]))
                    start.kill()
                break
            faults.remove(due)
            outcomes.append(Outcome(due.fault.name, did))
            see_it_through(start, due, outcomes[-1])
        return outcomes

    def _leftovers(self, start: Start) -> Iterator[str]:
        if left := start.left_after(GONE_S):
            yield f"left behind: {', '.join(process.name() for process in left)}"


def inject(start: Start, planned: Planned) -> str:
    """At its moment; what was done. Empty if the start ended before that."""
    start.arm()
    moment, rng = MOMENTS[planned.moment], Random(planned.seed)
    wait(lambda: moment.is_there(start) or start.has_ended(), START_LIMIT_S, pause_s=0.003)
    time.sleep(planned.delay_s)
    while not start.has_ended():
        steps = start.count_steps()
        start.arm()
        try:
            did = planned.fault.act(start, rng)
        except psutil.NoSuchProcess:  # not yet, or no more
            time.sleep(0.05)
            continue
        return f"{did}, {planned.moment} + {planned.delay_s:.2f} s, {steps} steps of the start done"
    return ""


def see_it_through(start: Start, planned: Planned, outcome: Outcome) -> None:
    """Until the start has ended, or torchrun brought it back, or it goes on."""
    if planned.fault.is_survived:
        see_it_go_on(start, planned, outcome)
        return
    begin, limit_s = time.monotonic(), planned.fault.limit_s
    if not wait(lambda: start.has_ended() or start.is_back(), limit_s):
        # A rank that is held behind its last word is torchrun's to wait for, and no other rank's.
        if not start.has_reported():
            outcome.problems.append(f"still there after {limit_s:.0f} s")
        start.kill()
    if start.has_ended():
        start.left_after(GONE_S)
    outcome.came_back = "same command" if start.has_ended() else "torchrun"
    if start.torchrun.returncode == 0:
        outcome.came_back = "had finished"
    outcome.seconds = time.monotonic() - begin
    outcome.said = start.said()


def see_it_go_on(start: Start, planned: Planned, outcome: Outcome) -> None:
    """Until it has finished another iteration, or all of them. An engine's death has to be told
    first: one that nobody asked anything any more is told by nobody, and then the run ends."""
    begin, limit_s = time.monotonic(), planned.fault.limit_s
    dies = planned.fault.needs_engine

    def goes_on() -> bool:
        said = start.told_death()
        return start.has_new_step(behind=said) if said or not dies else False

    if not wait(lambda: start.has_ended() or goes_on(), limit_s):
        outcome.problems.append(f"did not go on within {limit_s:.0f} s")
        start.kill()
    outcome.came_back, outcome.said = "went on", start.told_death()
    code = start.torchrun.poll()
    if code == 0:
        outcome.came_back = "had finished"
    elif code is not None and not outcome.problems:
        outcome.problems.append(f"ended with code {code}: {start.said()}")
    outcome.seconds = time.monotonic() - begin


def wait(condition: Callable[[], bool], seconds: float, pause_s: float = 0.05) -> bool:
    """Whether it came true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True
