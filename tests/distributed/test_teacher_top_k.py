"""A teacher's top k over tensor-parallel ranks, against dense float64."""

import pytest
import torch
import torch.distributed as dist

from tests import test_teacher_top_k as whole
from tests.distributed.test_losses import cut, join, relative_error
from tests.ranks import run_ranks

# Shapes: N tokens, W whole vocabulary.


def check_objectives(N: int, W: int, dtype: torch.dtype):
    tp, rank = dist.get_world_size(), dist.get_rank()
    width = -(-W // tp) + 3
    options = {"tp_group": dist.group.WORLD, "vocab_size": W}
    student, teacher, ids, rollout_logprobs = whole.case(N, W, dtype)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1))
    found = whole.payload(cut(teacher, width, rank), ids, **options)
    whole.assert_payload_is_exact(found, teacher, ids)
    for value in found:
        assert all(torch.equal(value, other) for other in everyones(value))
    for objective in whole.objectives():
        expected = whole.dense_losses(student, teacher, ids, rollout_logprobs, objective, weights)
        shard = cut(student, width, rank).requires_grad_()
        terms = whole.terms_of(shard, found, ids, **options)
        loss, gate = whole.losses(terms, shard, rollout_logprobs, objective)
        (weights * loss).sum().backward()
        assert ((loss - expected[0]).abs() / expected[0].abs().clamp(min=1)).max() < 1e-5, objective
        assert (gate - expected[1]).abs().max() < 1e-5
        tolerance = 2e-5 if dtype == torch.float32 else 2**-8
        assert relative_error(join(shard.grad, W), expected[2]) < tolerance, objective


def everyones(value: torch.Tensor) -> list[torch.Tensor]:
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    return values


def check_zero_tokens():
    student, teacher, ids, _ = (x[:0] for x in whole.case())
    options = {"tp_group": dist.group.WORLD, "vocab_size": whole.W}
    shard = cut(student, whole.W, dist.get_rank()).requires_grad_()
    found = whole.payload(cut(teacher, whole.W, dist.get_rank()), ids, **options)
    terms = whole.terms_of(shard, found, ids, **options)
    terms.picked.top_student_logprobs.sum().backward()
    assert shard.grad.shape == shard.shape
    assert terms.non_finite_R2.tolist() == [[0, 0]] * dist.get_world_size()


def check_non_finite():
    """The student's are counted where they are, the teacher's on rank 0."""
    student, teacher, ids, _ = whole.case(4, 40)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    width = 40 // dist.get_world_size()
    options = {"tp_group": dist.group.WORLD, "vocab_size": 40}
    student[[0, 2], -1] = teacher[1, -1] = torch.nan
    found = whole.payload(cut(teacher, width, rank), ids, **options)
    counts = whole.terms_of(cut(student, width, rank), found, ids, **options).non_finite_R2
    expected = torch.zeros(last + 1, 2, dtype=torch.int64)
    expected[last, 0], expected[0, 1] = 2, 1
    assert torch.equal(counts, expected)


def check_collectives():
    calls = []
    original = dist.all_gather
    dist.all_gather = lambda *a, **k: (calls.append("all_gather"), original(*a, **k))[1]
    for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter"):
        setattr(dist, name, lambda *a, name=name, **k: calls.append(name))
    student, teacher, ids, _ = whole.case()
    options = {"tp_group": dist.group.WORLD, "vocab_size": whole.W}
    found = whole.payload(cut(teacher, whole.W, dist.get_rank()), ids, **options)
    calls.clear()
    shard = cut(student, whole.W, dist.get_rank()).requires_grad_()
    terms = whole.terms_of(shard, found, ids, **options)
    assert calls == ["all_gather"]
    terms.picked.top_student_logprobs.sum().backward()
    assert calls == ["all_gather"]


def check_all():
    check_objectives(8, 61, torch.float32)
    check_objectives(8, 61, torch.bfloat16)
    check_objectives(3, 7, torch.float32)  # the last ranks hold padding only, and k is W − 1
    check_zero_tokens()
    check_non_finite()
    check_collectives()  # last: it replaces functions of torch.distributed


@pytest.mark.parametrize("tp", [2, 4])
def test_top_k_of_a_cut_vocabulary_matches_dense_float64(tp, tmp_path):
    """Whatever the cut: the same payload on every rank, values, gates and gradients; one collective
    forward and none backward."""
    run_ranks(tp, tmp_path, check_all)
