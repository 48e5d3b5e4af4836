"""Faulty tensor-parallel constructions that were released elsewhere, beside ours.

Each is written out here, shown to be far from float64, and ours is shown to be right on the same
numbers: a test that both pass would prove nothing.
"""
# Shapes: N tokens, V this rank's columns, W whole vocabulary.

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable

from megatron_eopd.losses import dense_kl_terms, vocab_parallel_terms
from tests.distributed.test_losses import join
from tests.ranks import run_ranks

N, W = 4, 40
PAIRS = {"reverse_kl": 0, "forward_kl": 1}


def logits():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, W, generator=generator), torch.randn(N, W, generator=generator)


def shard(whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].clone()


def error(gradient_NV: torch.Tensor, expected_NW: torch.Tensor) -> float:
    """Relative, of the whole gradient."""
    whole = join(gradient_NV.contiguous(), W)
    return ((whole - expected_NW).norm() / expected_NW.norm()).item()


def dense_gradient(loss_of) -> torch.Tensor:
    student, teacher = logits()
    dense = student.double().requires_grad_()
    loss_of(dense, teacher.double()).backward()
    return dense.grad


def reduced_in_place(student_NV, teacher_NV, name):
    """A softmax whose denominator is all-reduced in place, under autograd's eyes."""

    def log_softmax(x):
        denominator = x.exp().sum(-1, keepdim=True)
        dist.all_reduce(denominator)
        return x - denominator.log()

    q, p = log_softmax(student_NV), log_softmax(teacher_NV)
    own = (q.exp() * (q - p) if name == "reverse_kl" else p.exp() * (p - q)).sum()
    return own


def check_in_place():
    for name in PAIRS:
        expected = dense_gradient(lambda s, t, name=name: getattr(dense_kl_terms(s, t), name).sum())
        student, teacher = (shard(x) for x in logits())
        faulty = student.clone().requires_grad_()
        reduced_in_place(faulty, teacher, name).backward()
        ours = student.clone().requires_grad_()
        terms = vocab_parallel_terms(ours, teacher, tp_group=dist.group.WORLD)
        getattr(terms.kl, name).sum().backward()
        assert error(faulty.grad, expected) > 0.2, name
        assert error(ours.grad, expected) < 1e-5, name


def check_foreign_ids():
    """Sampled tokens of other ranks sent to column 0 and assigned there: real updates are lost."""
    ids = torch.tensor([0, 0, W // 2, W - 1])
    rows = torch.arange(N)
    expected = dense_gradient(lambda s, _: s.log_softmax(-1)[rows, ids].sum())
    student, teacher = (shard(x) for x in logits())
    ours = student.clone().requires_grad_()
    terms = vocab_parallel_terms(ours, teacher, tp_group=dist.group.WORLD, sampled_ids=ids)
    terms.picked.sampled_student_logprobs.sum().backward()
    assert error(ours.grad, expected) < 1e-5

    first = dist.get_rank() * student.shape[-1]
    owned = (ids >= first) & (ids < first + student.shape[-1])
    faulty = -logits()[0].softmax(-1)[:, first : first + student.shape[-1]]
    faulty[rows, torch.where(owned, ids - first, 0)] = owned.float()  # assigned, not added
    assert error(faulty, expected) > 0.1


def check_summed_gather():
    """An all-gather whose backward sums the same loss of every rank: TP times too large."""
    expected = dense_gradient(lambda s, _: s.log_softmax(-1).topk(3).values.sum())
    student, _ = (shard(x) for x in logits())
    faulty = student.clone().requires_grad_()
    whole = torch.cat(differentiable.all_gather(faulty), dim=-1)
    whole.log_softmax(-1).topk(3).values.sum().backward()
    assert error(faulty.grad, dist.get_world_size() * expected) < 1e-5
    ours = student.clone().requires_grad_()
    terms = vocab_parallel_terms(
        ours, ours.detach(), tp_group=dist.group.WORLD, top_k=3, top_k_of="student"
    )
    terms.picked.top_student_logprobs.sum().backward()
    assert error(ours.grad, expected) < 1e-5


@pytest.mark.parametrize("check", [check_in_place, check_foreign_ids, check_summed_gather])
def test_ours_is_right_where_a_released_construction_is_not(check, tmp_path):
    run_ranks(2, tmp_path, check)
