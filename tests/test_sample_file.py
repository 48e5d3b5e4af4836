"""Samples of an evaluation on the disk, after whatever ended it."""

import json

import pytest

from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.sample_file import Measured, Sample, SampleFile
from megatron_eopd.records import Prompt

SETTINGS = {"temperature": 1.0, "prompts": "digest"}
COUNT = 2


def samples(problem: int) -> list[Sample]:
    return [
        Sample(problem, n, "right", "4", True, "stop", 7, f"zwei\n{n} → 4 ✓", (5, 6, n))
        for n in range(COUNT)
    ]


def opened(path, settings=SETTINGS, *, anew=False) -> SampleFile:
    return SampleFile(path, settings, COUNT, anew=anew)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "evaluation" / "task.samples.jsonl"
    file = opened(path)
    for problem in (2, 0):
        file.add(samples(problem))
    file.close()
    return path


def test_what_was_added_is_read_again_in_any_order(path):
    file = opened(path)
    assert [file.has(n) for n in range(3)] == [True, False, True]
    file.add(samples(1))
    assert [file.read(n) for n in (1, 2, 0)] == [samples(1), samples(2), samples(0)]
    first, *_ = file.outcomes()
    assert first.verdicts == ("right", "right") and first.lengths == (3, 3)
    rollout = file.read(2)[1].rollout(Prompt(2, "2 + 2", "4", (1, 2)))
    assert (rollout.response_ids, rollout.finish_reason) == ((5, 6, 1), "stop")


def test_a_kill_at_any_byte_costs_the_problem_that_was_being_written(path):
    """The rest stays, and what is added then stands behind it."""
    content = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(content) if byte == ord("\n")]
    whole = {ends[2]: [2], ends[4]: [2, 0]}
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        file = opened(path)
        expected = max((known for at, known in whole.items() if at <= end), key=len, default=[])
        assert [n for n in (2, 0) if file.has(n)] == expected, end
        file.add(samples(5))
        file.close()
        again = opened(path)
        assert again.read(5) == samples(5)
        assert all(again.read(n) == samples(n) for n in expected)
        again.close()


def test_samples_that_were_drawn_otherwise_are_not_gone_on_with(path):
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"temperature was 1.0, now 0.5; seed was None, now 3"):
        opened(path, SETTINGS | {"temperature": 0.5, "seed": 3})
    assert path.read_bytes() == before
    assert not opened(path, SETTINGS | {"temperature": 0.5}, anew=True).has(0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[:2] + lines[3:], "line 3: sample 0 of problem 0, where sample 1 of"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "line 2: sample 1 of problem 2"),
        (lambda lines: [*lines[:2], b'{"problem": 2}\n'], "line 3: no sample of an evaluation"),
    ],
)
def test_a_file_that_somebody_mended_mixes_no_problems(path, change, said):
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(ConfigError, match=said):
        opened(path)


def test_two_evaluations_do_not_write_into_one_file(path):
    file = opened(path)
    with pytest.raises(ConfigError, match="another evaluation writes there"):
        opened(path)
    file.close()
    opened(path).close()


def test_damage_in_the_middle_loses_nothing(path):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"problem": 2, "sam\n'
    path.write_bytes(b"".join(lines))
    with pytest.raises(ConfigError, match="line 3: damaged"):
        opened(path)
    assert path.read_bytes() == b"".join(lines)


def test_what_was_measured_is_kept_as_long_as_it_was_measured_so(tmp_path):
    path = tmp_path / "task.measured.jsonl"
    sums = {"loss/reverse_kl": [0.1 + 0.2, 3.0]}
    measured = Measured(path, {"teacher": "a"}, anew=False)
    measured.add(1, sums)
    measured.add(0, {})
    with path.open("a") as file:
        file.write(json.dumps({"chunk": 2})[:-3])  # a kill
    again = Measured(path, {"teacher": "a"}, anew=False)
    assert again.sums() == [{}, sums] and again.of(2) is None
    assert Measured(path, {"teacher": "b"}, anew=False).sums() == []
