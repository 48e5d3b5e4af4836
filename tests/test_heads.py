"""What the loss reads of several teachers, chunk by chunk."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_eopd.records import HiddenStates, TeacherPart, TeacherTopK
from megatron_eopd.teacher.exchange import runs_of
from megatron_eopd.teacher.heads import teacher_logits, teacher_top_k

RUNS = {"math": (range(0, 3), range(8, 12)), "code": (range(3, 8),), "law": (range(12, 13),)}
HIDDEN, VOCAB = 4, 6
CHUNKS = [slice(None), *(slice(n, n + size) for size in (1, 2, 5, 13) for n in range(0, 13, size))]


def make_parts():
    heads = {name: torch.randn(VOCAB, HIDDEN) for name in RUNS}
    hidden = torch.randn(13, HIDDEN)
    rows = {
        name: torch.cat([hidden[r.start : r.stop] for r in runs]) for name, runs in RUNS.items()
    }
    parts = [TeacherPart(name, runs, HiddenStates(rows[name])) for name, runs in RUNS.items()]
    return parts, hidden, heads


@pytest.mark.parametrize("rows", CHUNKS)
def test_each_token_gets_the_logits_of_its_own_teacher(rows):
    torch.manual_seed(0)
    parts, hidden, heads = make_parts()
    owner = {token: name for name, runs in RUNS.items() for run in runs for token in run}
    expected = torch.stack([heads[owner[n]] @ hidden[n] for n in range(13)])
    torch.testing.assert_close(teacher_logits(parts, rows, heads), expected[rows])


def test_of_a_chunk_no_value_is_asked_for():
    """A fake tensor has none to give."""
    with FakeTensorMode():
        parts, _, heads = make_parts()
        assert teacher_logits(parts, slice(2, 9), heads).shape == (7, VOCAB)


def test_no_tokens_are_no_rows():
    parts, _, heads = make_parts()
    assert teacher_logits(parts, slice(0, 0), heads).shape == (0, VOCAB)
    none = TeacherTopK(*(torch.zeros(0, 2),) * 2, *(torch.zeros(0),) * 3)
    part = TeacherPart("math", (range(0),), none)
    assert len(teacher_top_k([part], slice(0, 5), 2, torch.device("cpu")).ids_NK) == 0


@pytest.mark.parametrize("numbers", [[], [4], [0, 1, 2], [1, 2, 7, 8, 9, 12]])
def test_rising_numbers_are_the_runs_that_they_make(numbers):
    assert [n for run in runs_of(numbers) for n in run] == numbers
    assert len(runs_of(numbers)) == sum(n - 1 not in numbers for n in numbers)
