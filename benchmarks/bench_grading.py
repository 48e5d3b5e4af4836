"""What grading costs: answers per second, and what hostile ones among them do to it.

    python benchmarks/bench_grading.py [--problems math500.jsonl] [--workers 2] [--answers 10000]

Three rows: answers of a model to MATH-500, half of them right; the same with 1 % that hang in C,
eat memory or are 100 kB long; and hostile texts alone, as a model that has gone wrong writes them.
"""

import argparse
import random
import re
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
from tqdm import tqdm

from megatron_eopd.evaluation.grading_pool import GradingPool
from megatron_eopd.tasks.math import MathTask
from megatron_eopd.tasks.task import Task

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.hostile_task import HostileTask

DATA = Path(__file__).parents[2] / "shared/data/math500/math500.jsonl"
HOSTILE_SHARE = 0.01
HOSTILE = HostileTask()
HOSTILE_VERBS = ("hang_in_c", "spin", "eat_memory", "crash")
HOSTILE_TEXTS = (
    "9" * 100_000,
    "9^{9^{9^{9}}}",
    r"9^{9\cdot 10^{9}}",
    r"\binom{9999}{4999}^{4999}",
    r"\sum_{k=1}^{4999} k^{k}",
    r"\prod_{k=1}^{3000} (k^2+1)",
    r"\int_0^1 e^{x^2} \sin(x^3) dx",
    "(" * 500 + "x" + ")" * 500,
    "((5!)!)!",
    "x+" * 4_000 + "x",
    "__import__('os').system('true')",
    "的" * 1_000,
)


class Answer(NamedTuple):
    task: Task
    gold: str
    response: str


def usual(task: MathTask, number: int, rng: random.Random) -> Iterator[Answer]:
    golds = [problem.answer for problem in task.problems()]
    reasoning = "Let us think step by step, with $x = 1$. " * 40
    for _ in range(number):
        gold, other = rng.sample(golds, 2)
        written = gold if rng.random() < 0.5 else other
        yield Answer(task, gold, f"{reasoning}$\\boxed{{{rewritten(written)}}}$.")


def rewritten(answer: str) -> str:
    spaced = re.sub(r",(?!\d{3}(?!\d))", ", ", answer)  # 58, 500 is another answer than 58,500
    return spaced.replace(r"\frac", r"\dfrac")


def with_hostile(answers: Iterable[Answer], rng: random.Random) -> Iterator[Answer]:
    for answer in answers:
        if rng.random() >= HOSTILE_SHARE:
            yield answer
        elif rng.random() < 1 / 3:
            yield answer._replace(response=f"\\boxed{{{'9' * 100_000}}}")
        else:
            yield Answer(HOSTILE, "", rng.choice(HOSTILE_VERBS))


def hostile(task: MathTask, number: int, rng: random.Random) -> Iterator[Answer]:
    golds = [problem.answer for problem in task.problems()]
    for index in range(number):
        text = HOSTILE_TEXTS[index % len(HOSTILE_TEXTS)]
        yield Answer(task, rng.choice(golds), f"\\boxed{{{text}}}")


class Measured(NamedTuple):
    seconds: float
    verdicts: Counter[str]
    slowest_s: float
    peak_mb: float
    """Of the pool's processes together, not of the caller."""


def measure(answers: list[Answer], workers: int) -> Measured:
    verdicts: Counter[str] = Counter()
    slowest = peak = 0.0
    pending: deque = deque()
    with GradingPool([answers[0].task, HOSTILE], workers=workers) as pool:
        pool.submit(answers[0].task, "1", r"\boxed{2}").result()  # not the start
        begin = last = time.perf_counter()
        for number, answer in enumerate(tqdm(answers, leave=False, disable=None)):
            pending.append(pool.submit(*answer))
            while len(pending) > 200 or (pending and pending[0].done()):
                verdicts[pending.popleft().result().verdict] += 1
                slowest = max(slowest, time.perf_counter() - last)
                last = time.perf_counter()
            if number % 500 == 0:
                peak = max(peak, memory_mb())
        verdicts.update(future.result().verdict for future in pending)
        seconds = time.perf_counter() - begin
        peak = max(peak, memory_mb())
    return Measured(seconds, verdicts, slowest, peak)


def memory_mb() -> float:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it was killed meanwhile
            continue
    return total / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", default=str(DATA), help="as the preset math500 reads them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--answers", type=int, default=10_000)
    options = parser.parse_args()
    task = MathTask("math500", options.problems, "math500")
    rng = random.Random(0)
    rows = {
        "usual": list(usual(task, options.answers, rng)),
        "1 % hostile": list(with_hostile(usual(task, options.answers, rng), rng)),
        "hostile texts": list(hostile(task, options.answers // 50, rng)),
    }
    print("| answers | number | seconds | a second | longest wait, s | peak, MB | verdicts |")
    print("|---|---|---|---|---|---|---|")
    for name, answers in rows.items():
        found = measure(answers, options.workers)
        verdicts = ", ".join(f"{number} {verdict}" for verdict, number in found.verdicts.items())
        print(
            f"| {name} | {len(answers):,} | {found.seconds:.1f} | "
            f"{len(answers) / found.seconds:,.0f} | {found.slowest_s:.1f} | {found.peak_mb:.0f} | "
            f"{verdicts} |",
            flush=True,
        )
    left = psutil.Process().children(recursive=True)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nprocesses left: {len(left)}; peak of the caller: {own:.0f} MB")


if __name__ == "__main__":
    main()
