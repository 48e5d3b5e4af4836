"""Grading in processes that are killed: nothing that an answer does is felt by the next one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.grading_pool import GradingPool, check_answers
from megatron_eopd.tasks.task import Grade, Problem, Verdict
from tests.hostile_task import Exiting, HostileTask, Reading
from tests.living import is_alive, wait_until_gone

TASK = HostileTask()
ROOT = Path(__file__).parents[1]


@pytest.fixture
def pool():
    with GradingPool([TASK], cpu_s=0.5, wall_s=5, memory_mb=256) as pool:
        yield pool


def processes_of(parent: int) -> list[psutil.Process]:
    return psutil.Process(parent).children(recursive=True)


@pytest.mark.parametrize("verb", ["spin", "hang_in_c", "eat_memory", "crash", "exit"])
def test_what_takes_too_much_is_timed_out(pool, verb):
    """In Python, in C, in memory, or by an end; and the next answer is graded."""
    futures = [pool.submit(TASK, "", text) for text in (verb, "say a", verb, verb, "say b")]
    verdicts = [future.result(timeout=30).verdict for future in futures]
    killed, right = Verdict.TIMED_OUT, Verdict.RIGHT
    assert verdicts == [killed, right, killed, killed, right]


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        *((f"exit {code}", f"the grader process exited with code {code}") for code in (0, 3)),
        # As a grader does by itself, between two answers.
        *((f"exit {code}", f"the grader process exited with code {code}") for code in (70, 71)),
        ("crash", "the grader process was killed by signal 11 (Segmentation fault)"),
        *((text, "") for text in ("spin", "hang_in_c", "eat_memory")),
    ],
)
def test_an_end_by_itself_is_told_from_a_limit(pool, text, detail):
    """By the detail of the verdict; and the next answer is graded."""
    ended, other = [pool.submit(TASK, "", each) for each in (text, "say a")]
    assert ended.result(timeout=30) == Grade(Verdict.TIMED_OUT, detail=detail)
    assert other.result(timeout=30).canonical == "a"


def test_the_limit_is_of_processor_time(pool):
    """So a busy machine does not change a verdict: what waits is given its time."""
    assert pool.submit(TASK, "", "sleep 1").result(timeout=30).verdict is Verdict.RIGHT


def test_what_sleeps_for_ever_is_timed_out():
    with GradingPool(workers=1, wall_s=0.3) as pool:
        assert pool.submit(TASK, "", "sleep 60").result(timeout=30).verdict is Verdict.TIMED_OUT
        assert pool.submit(TASK, "", "say a").result(timeout=30).canonical == "a"


def test_time_counts_from_the_start_of_the_work():
    """Not from when it was submitted: here each waits for longer than one may take."""
    with GradingPool(workers=1, wall_s=0.5) as pool:
        futures = [pool.submit(TASK, "", "sleep 0.2") for _ in range(6)]
        assert {future.result(timeout=30).verdict for future in futures} == {Verdict.RIGHT}


def test_a_fault_of_the_task_is_told(pool):
    """With its traceback, and for that answer only."""
    with pytest.raises(ConfigError, match=r"(?s)own grading failed.*KeyError: 'it'"):
        pool.submit(TASK, "", "fail it").result(timeout=30)
    assert pool.submit(TASK, "", "say a").result(timeout=30).canonical == "a"


def test_grades_belong_to_their_answers(pool):
    """Also where graders are killed between them."""
    texts = ["crash" if number % 50 == 7 else f"say {number}" for number in range(300)]
    futures = [pool.submit(TASK, "", text) for text in texts]
    for text, future in zip(texts, futures, strict=True):
        expected = "" if text == "crash" else text.removeprefix("say ")
        assert future.result(timeout=30).canonical == expected


def test_hostile_answers_among_others(pool):
    """300 answers, 3 of them hostile, in seconds; the longest response is 1 MB."""
    texts = ["say " + "9" * 1_000_000, *["say x"] * 296, "hang_in_c", "spin", "eat_memory"]
    start = time.monotonic()
    futures = [pool.submit(TASK, "", text) for text in texts]
    verdicts = Counter(future.result(timeout=30).verdict for future in futures)
    assert verdicts == {Verdict.RIGHT: 297, Verdict.TIMED_OUT: 3}
    assert time.monotonic() - start < 20


def test_submit_waits_while_many_are_pending():
    """So memory is bounded, however many answers there are."""
    with GradingPool(workers=1, max_pending=2) as pool:
        futures = []
        submitting = threading.Thread(
            target=lambda: futures.extend(pool.submit(TASK, "", "sleep 0.2") for _ in range(8)),
        )
        submitting.start()
        time.sleep(0.3)
        assert submitting.is_alive()
        submitting.join(timeout=30)
        assert [future.result(timeout=30).verdict for future in futures] == [Verdict.RIGHT] * 8


def test_nothing_heavy_is_imported_by_a_grader(pool):
    """Nor what started the pool is, which may be a training run."""
    modules = pool.submit(TASK, "", "name_modules").result(timeout=30).canonical.split()
    assert not {"torch", "transformers", "megatron", "datasets", "pytest"} & set(modules)


def test_no_process_is_left(pool):
    pids = {pool.submit(TASK, "", "name_process").result(timeout=30).canonical for _ in range(9)}
    assert str(os.getpid()) not in pids
    before = [process for process in processes_of(os.getpid()) if is_alive(process)]
    assert len(before) >= 3
    pool.__exit__(None)
    wait_until_gone(lambda: [process for process in before if is_alive(process)], 5)


def test_a_killed_keeper_costs_no_answer(pool):
    """Somebody else, such as the kernel on a full machine, may kill any process of the pool."""
    for _ in range(3):
        assert pool.submit(TASK, "", "say a").result(timeout=30).canonical == "a"
        for process in processes_of(os.getpid()):
            process.kill()
        time.sleep(0.05)
    futures = [pool.submit(TASK, "", f"say {number}") for number in range(20)]
    assert [future.result(timeout=30).canonical for future in futures] == [
        str(n) for n in range(20)
    ]


def test_signals_of_the_terminal_are_for_the_caller(pool):
    assert pool.submit(TASK, "", "say a").result(timeout=30).canonical == "a"
    futures = [pool.submit(TASK, "", "sleep 0.5") for _ in range(2)]
    time.sleep(0.2)
    for process in processes_of(os.getpid()):
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
    assert [future.result(timeout=30).verdict for future in futures] == [Verdict.RIGHT] * 2


def test_an_exception_ends_the_pool_at_once():
    start = time.monotonic()
    with pytest.raises(KeyError), GradingPool([TASK], wall_s=60) as pool:
        futures = [pool.submit(TASK, "", "sleep 50") for _ in range(20)]
        time.sleep(1)
        raise KeyError
    assert time.monotonic() - start < 10
    assert all(future.done() for future in futures)


def test_a_pool_that_cannot_start_says_so():
    class Broken(HostileTask):
        preload = ("no_such_module",)

    with GradingPool([Broken()], workers=1) as pool, pytest.raises(RuntimeError, match="died"):
        pool.submit(TASK, "", "say a").result(timeout=60)


CALLER = """
import time
from megatron_eopd.evaluation.grading_pool import GradingPool
from tests.hostile_task import Exiting, HostileTask, Reading

with GradingPool([HostileTask()], cpu_s=60) as pool:
    task = HostileTask()
    for _ in range(4):
        pool.submit(task, "", "name_process").result()
    for _ in range(8):
        pool.submit(task, "", "spin")
    print("working", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_nothing_outlives_the_caller(name):
    """Killed in the middle of the work, it leaves no process after 5 s."""
    caller = subprocess.Popen([sys.executable, "-c", CALLER], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert caller.stdout.readline() == b"working\n"
        left = processes_of(caller.pid)
        assert len(left) >= 4  # two keepers, two graders
        caller.send_signal(signal.Signals[name])
        caller.wait(timeout=10)
        wait_until_gone(lambda: [process for process in left if is_alive(process)], 5)
    finally:
        caller.kill()
        caller.stdout.close()


def test_problems_whose_own_answer_is_not_right_are_told(pool):
    """By lines, before a run begins."""
    texts = ["say a", "wrong", "say b", "wrong", "wrong", "crash"]
    problems = [
        Problem(f"problems.jsonl line {number}", "?", text)
        for number, text in enumerate(texts, start=1)
    ]
    with pytest.raises(
        ConfigError, match=r"hostile: 4 of 6 .* problems.jsonl lines 2, 4-6"
    ) as info:
        check_answers(TASK, problems, pool)
    assert "'wrong': wrong" in str(info.value)
    check_answers(TASK, [problem for problem in problems if "say" in problem.answer], pool)


def test_an_own_answer_that_ends_the_process_is_told_with_how(pool):
    with pytest.raises(ConfigError, match=r"timed out \(the grader process exited with code 3\)"):
        check_answers(TASK, [Problem("own.jsonl line 1", "?", "exit 3")], pool)


def test_a_task_that_ends_the_process_is_told_where_it_knows_no_right_response(pool):
    with pytest.raises(ConfigError, match=r"empty response to line 1.* exited with code 3"):
        check_answers(Exiting(), [Problem("line 1", "?", "")], pool)


def test_own_answers_are_read_where_there_is_a_limit():
    """If a task can say whether it can: of three one cannot be read, and one takes for ever."""
    texts = ["say ?", "say hang", "say a"]
    problems = [Problem(f"own.jsonl line {n}", "?", text) for n, text in enumerate(texts, start=1)]
    told = r"2 of 3 .* cannot read.* own.jsonl lines 1-2\. The first is 'say \?': unparsable"
    with GradingPool(cpu_s=0.5) as pool:
        with pytest.raises(ConfigError, match=told):
            check_answers(Reading(), problems, pool)
        check_answers(Reading(), problems[2:], pool)
