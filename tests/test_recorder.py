"""Responses of an engine into graded samples, in whatever order they come."""

from types import SimpleNamespace

import pytest
from tqdm import tqdm

from megatron_eopd.evaluation import recorder as recorder_module
from megatron_eopd.evaluation.grading_pool import GradingPool
from megatron_eopd.evaluation.recorder import Recorder
from megatron_eopd.evaluation.sample_file import SampleFile
from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.tasks.math import MathTask
from megatron_eopd.tasks.task import Problem, Task
from tests.hostile_task import Exiting, HostileTask

PROBLEMS = [Problem(f"line {n}", f"{n} + {n}?", str(2 * n)) for n in range(3)]
PROMPTS = [Prompt(n, p.text, p.answer, (1,)) for n, p in enumerate(PROBLEMS)]
MATH = MathTask("t")
TEXTS = {(1,): r"\boxed{0}", (2,): r"\boxed{2}", (3,): "no idea", (4,): "eat_memory"}


@pytest.fixture(scope="module")
def pool():
    with GradingPool([MATH]) as pool:
        yield pool


@pytest.fixture
def opened(pool, tmp_path):
    """Opens a recorder on the same file, again and again."""
    told: list[str] = []

    def opened(task: Task = MATH) -> Recorder:
        problems = SimpleNamespace(name="t", task=task, problems=PROBLEMS, prompts=PROMPTS)
        tokenizer = SimpleNamespace(decode=TEXTS.__getitem__)
        file = SampleFile(tmp_path / "t.samples.jsonl", {}, 2, anew=False)
        bar = tqdm(total=6, disable=True)
        return Recorder(problems, file, 2, pool, tokenizer, bar, told.append)

    opened.told = told
    return opened


def answer(problem: int, sample: int, ids: tuple[int, ...], reason: str = "stop") -> Rollout:
    return Rollout(PROMPTS[problem], sample, ids, (0.0,) * len(ids), reason, 5)


def test_problems_are_written_whole_and_in_the_order_of_their_samples(opened):
    with opened() as recorder:
        recorder.add(0, answer(1, 1, (2,)))
        recorder.add(0, answer(0, 1, (3,)))
        recorder.add(0, answer(1, 0, (1,)))
        recorder.add(0, answer(2, 0, (2,)))
        recorder.settle()
        assert [p.index for p in recorder.missing(PROMPTS)] == [0, 2]
        first, second = recorder.file.read(1)
        assert (first.sample, first.verdict, first.answer) == (0, "wrong", "0")
        assert (second.sample, second.verdict, second.second) == (1, "right", True)
    with opened() as recorder:
        assert [p.index for p in recorder.missing(PROMPTS)] == [0, 2], "after a new start, too"


def test_a_response_that_was_cut_is_never_right(opened):
    with opened() as recorder:
        recorder.add(0, answer(1, 0, (2,), "length"))
        recorder.add(0, answer(1, 1, (3,)))
        recorder.settle()
        assert [s.verdict for s in recorder.file.read(1)] == ["no answer"] * 2
        (outcome,) = recorder.file.outcomes()
        assert outcome.cut == (True, False)


def test_a_grader_that_ends_is_told_once(opened):
    """With the problem and how; each sample has it in its detail."""
    with opened(Exiting()) as recorder:
        for problem in (1, 2):
            for sample in (0, 1):
                recorder.add(0, answer(problem, sample, (2,)))
        recorder.settle()
        how = "the grader process exited with code 3"
        assert {(s.verdict, s.detail) for s in recorder.file.read(2)} == {("timed out", how)}
    (told,) = opened.told
    assert told.startswith(f"warning: evaluation on t: line 1: {how}")


def test_a_limit_is_no_warning(opened):
    with opened(HostileTask()) as recorder:
        recorder.add(0, answer(1, 0, (4,)))
        recorder.add(0, answer(1, 1, (4,)))
        recorder.settle()
        assert {(s.verdict, s.detail) for s in recorder.file.read(1)} == {("timed out", "")}
    assert opened.told == []


def test_a_log_hears_how_far_it_is(opened, monkeypatch):
    """Where no terminal shows a bar."""
    monkeypatch.setattr(recorder_module, "TELL_INTERVAL_S", 0.0)
    with opened() as recorder:
        recorder.add(0, answer(0, 0, (1,)))
    assert opened.told[0].startswith("evaluation on t: 1 of 6 samples,")
    assert "ETA" in opened.told[0]
