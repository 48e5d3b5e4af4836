"""Random faults over toy runs that are started again and again; see docs/reliability.md.

In: how many faults, and a seed. Out: a table, printed as it grows and written as Markdown. Exit
status 1 if a run did not end as it would have undisturbed, loaded what was damaged, or left a
process behind.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_eopd.cli import positive
from megatron_eopd.rollout.vllm_options import vllm_available
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.harness import Outcome, Round
from tests.chaos.plan import Planned, make_plan, next_round
from tests.chaos.runs import Kind, can_mount, small_disk
from tests.chaos.table import markdown

ITERATIONS = 6
FAULTS_PER_RUN = 8


@dataclass
class Progress:
    """Outcomes so far, and how long the rest will take."""

    count: int
    outcomes: list[Outcome] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def tell(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        number, seconds = len(self.outcomes), time.monotonic() - self.begin
        left = max(self.count - number, 0) * seconds / number
        result = "ok" if not outcome.problems else "FAILED: " + "; ".join(outcome.problems)
        print(
            f"{number:>3}/{self.count} | {outcome.fault}: {outcome.did} | {outcome.said:.120} | "
            f"{outcome.came_back}, {outcome.seconds:.1f} s | {result} | "
            f"ETA {left // 60:.0f}:{left % 60:02.0f}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves neither run nor mount
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    progress = Progress(args.faults)
    plan = make_plan(args.faults, args.seed, possible(folder), engine=vllm_available())
    runs = disturb(plan, folder, ITERATIONS, progress)
    text = markdown(progress.outcomes, args.seed, runs, time.monotonic() - progress.begin)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)
    print(f"{args.output}: {text.splitlines()[0]}")
    if any(outcome.problems for outcome in progress.outcomes):
        print(f"what the runs left: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=positive, default=20, metavar="N", help="default: 20")
    parser.add_argument("--seed", type=int, default=1, help="of the plan; default: 1")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/chaos.md"), help="default: runs/chaos.md"
    )
    return parser.parse_args(arguments)


def possible(folder: Path) -> list[Fault]:
    """Those that this machine allows; tells of the others."""
    has_engine, has_disk = vllm_available(), can_mount(folder)
    found = []
    for fault in FAULTS:
        if (fault.needs_engine and not has_engine) or (fault.needs_own_disk and not has_disk):
            print(
                f"left out: {fault.name}, which needs {'vLLM' if fault.needs_engine else 'mount'}"
            )
        else:
            found.append(fault)
    return found


def disturb(plan: list[Planned], folder: Path, iterations: int, progress: Progress) -> int:
    """All faults of the plan, over as many runs as that takes. Returns how many."""
    left, damaged_kinds, runs = list(plan), Counter[str](), 0
    with_engines = 0
    while left:
        runs += 1
        faults = next_round(left, FAULTS_PER_RUN)
        with_engines += faults[0].has_engine
        # One, whose death leaves none, and two in turn.
        num_engines = 2 - with_engines % 2 if faults[0].has_engine else 0
        kind = Kind(folder, num_engines, iterations)
        undisturbed = kind.undisturbed()
        with small_disk(folder / f"run{runs}") as run_dir:
            work = Round(run_dir, undisturbed, kind.options, damaged_kinds)
            if not work.work(faults, progress.tell):
                shutil.copytree(run_dir, folder / f"failed{runs}")
        left = faults + left
    return runs


if __name__ == "__main__":
    sys.exit(main())
