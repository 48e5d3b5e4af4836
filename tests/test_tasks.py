"""Tasks by name: the built-in ones, and one of a user's own as the docs write it."""

import re
from pathlib import Path

import pytest

from megatron_eopd.config import EvaluationConfig
from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.grading_pool import GradingPool, check_answers
from megatron_eopd.tasks.countdown import Countdown
from megatron_eopd.tasks.math import BOXED_SUFFIX
from megatron_eopd.tasks.registry import open_tasks, training_rows
from megatron_eopd.tasks.task import Grade, Problem, Verdict
from tests.faulty_task import Faulty

DOCS = Path(__file__).parents[1] / "docs/evaluation.md"
ROW = '{"problem": "1 + 1?", "answer": "2"}\n'


@pytest.fixture(scope="module")
def pool():
    with GradingPool(workers=1) as pool:
        yield pool


def opened(*tasks: str, with_suffix: bool = True, **options):
    return open_tasks(EvaluationConfig(tasks=tasks, **options), with_suffix=with_suffix)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mine.test.jsonl"
    path.write_text(ROW)
    return path


def test_names_come_from_the_preset_or_the_file(file, tmp_path):
    (tmp_path / "math500.jsonl").write_text(ROW)
    tasks = opened("countdown", "math500", f"gsm8k={file}", f"math={file}", data_dir=tmp_path)
    assert [task.name for task in tasks] == ["countdown", "math500", "gsm8k", "mine"]
    assert [p.text for p in tasks[1].problems()] == [f"1 + 1?\n{BOXED_SUFFIX}"]
    assert [p.text for p in tasks[3].problems()] == ["1 + 1?"]


def test_a_suffix_of_the_users_takes_the_place_of_the_presets(file):
    (task,) = opened(f"math500={file}", with_suffix=False)
    assert [problem.text for problem in task.problems()] == ["1 + 1?"]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("mat500", "no task mat500. There are countdown, math"),
        ("countdown=f", "countdown makes its problems itself"),
        ("math", "which problems"),
        ("champ", r"Write champ=FILE, or put them into data.champ.jsonl"),
        ("nowhere:Task", "No module named 'nowhere'"),
        ("json:Task", "has no attribute 'Task'"),
        ("pathlib:Path", "Path has no problems, grade, right_response, num_right, graders"),
    ],
)
def test_what_is_no_task_is_named(task, said):
    with pytest.raises(ConfigError, match=said):
        opened(task)


def test_two_tasks_of_one_name_would_share_their_files(file):
    with pytest.raises(ConfigError, match="two tasks are called mine"):
        opened(f"math={file}", f"number={file}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no problems"),
        ('{"problem": "p", "solution": "s"}\n', "line 1: no column with the answer"),
        (ROW + '{"problem": "p", "answer": ""}\n' * 2, r"2 of 3 problems .* lines 2-3\."),
    ],
)
def test_a_file_without_problems_or_answers_is_named(tmp_path, content, said):
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    (task,) = opened(f"math={path}")
    with pytest.raises(ConfigError, match=said):
        task.problems()


def test_the_task_of_the_docs_is_one(tmp_path, monkeypatch):
    """Found from the working directory, and graded in processes that find it, too."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    (tmp_path / "mytask.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (task,) = opened("mytask:Parity")
    problems = list(task.problems())
    with GradingPool([task]) as pool:
        check_answers(task, problems, pool)
        assert pool.submit(task, "odd", "It is even.").result(60).verdict == Verdict.WRONG
        assert pool.submit(task, "odd", "even or odd").result(60).verdict == Verdict.NO_ANSWER


@pytest.mark.parametrize(
    ("faulty", "said"),
    [
        (Faulty(verdict=True), "grade.. returned True, and not a Grade"),
        (Faulty(verdict="rihgt"), "'rihgt' is not a valid Verdict"),
        (Faulty(count=0), "num_right is 0 for line 1"),
        (Faulty(extra=lambda: 0), "cannot be sent to a process that grades"),
    ],
)
def test_a_task_that_is_none_is_told_before_anything_is_drawn(faulty, said, pool):
    with pytest.raises(ConfigError, match=said):
        check_answers(faulty, [Problem("line 1", "q", "a")], pool)


def test_names_of_files_are_names_of_tasks(tmp_path):
    for name, expected in ((".hidden.jsonl", "hidden"), ("it's mine.jsonl", "it_s_mine")):
        (tmp_path / name).write_text(ROW)
        (task,) = opened(f"math={tmp_path / name}")
        assert task.name == expected


def test_countdown_grades_as_its_verifier_and_counts_all_solutions():
    task = Countdown()
    for problem in list(task.problems())[:20]:
        right = task.right_response(problem.answer)
        assert task.grade(problem.answer, right) == Grade(Verdict.RIGHT, right)
        assert task.num_right(problem.answer) >= 1
        wrong = right[:-1] + str((int(right[-1]) + 1) % 10)
        assert task.grade(problem.answer, wrong).verdict == Verdict.WRONG
    assert task.grade(problem.answer, "8 * 7 = 56").verdict == Verdict.NO_ANSWER


def test_training_rows_are_no_held_out_problems():
    held_out = {problem.text for problem in Countdown().problems()}
    assert not held_out & {row.text for row in training_rows("countdown")}
    assert training_rows("prompts.jsonl") is None
