"""The vocab-parallel KL terms against the dense float64 formula, values and gradients."""

import pytest
import torch
import torch.distributed as dist

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses import dense_kl_terms, token_objective, vocab_parallel_kl_terms
from tests.ranks import run_ranks

# Shapes: N tokens, W whole vocabulary.


def case_logits(kind: str, N: int, W: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(N, W, generator=generator) for _ in range(2))
    if kind == "flat":
        return student, teacher
    if kind == "scaled":
        return 30 * student, 30 * teacher
    if kind == "offset":
        return student + 100, teacher - 100
    if kind == "peaked":  # p > 0.9999 on one token each
        student[:, 0] += 20
        teacher[:, -1] += 20
        return student, teacher
    assert kind == "forbidden"  # columns that neither model can write
    student[:, ::3] = teacher[:, ::3] = -torch.inf
    return student, teacher


KINDS = ["flat", "scaled", "offset", "peaked", "forbidden"]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Against the largest entry: single entries of a gradient pass through 0."""
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def cut(whole: torch.Tensor, width: int, rank: int) -> torch.Tensor:
    """This rank's columns; padding is garbage on purpose, larger than any logit."""
    padded = torch.full((whole.shape[0], width * dist.get_world_size()), 1e4)
    padded[:, : whole.shape[1]] = whole
    return padded[:, rank * width : (rank + 1) * width].clone()


def check_terms(N: int, W: int):
    tp, rank = dist.get_world_size(), dist.get_rank()
    width = -(-W // tp) + 3
    for kind in KINDS:
        student, teacher = case_logits(kind, N, W)
        weights = torch.randn(2, N, generator=torch.Generator().manual_seed(1))

        dense = student.double().requires_grad_()
        expected = dense_kl_terms(
            # A finite stand-in: autograd of the dense formula makes NaN of −inf − (−inf).
            dense.clamp(min=-1e4),
            teacher.double().clamp(min=-1e4),
            student_temperature=0.7,
            teacher_temperature=1.3,
        )
        (weights[0] * expected.reverse_kl + weights[1] * expected.forward_kl).sum().backward()

        shard = cut(student, width, rank).requires_grad_()
        found = vocab_parallel_kl_terms(
            shard,
            cut(teacher, width, rank),
            tp_group=dist.group.WORLD,
            vocab_size=W,
            student_temperature=0.7,
            teacher_temperature=1.3,
        )
        (weights[0] * found.reverse_kl + weights[1] * found.forward_kl).sum().backward()

        # float32 logits of size 100/0.7 carry an absolute rounding of 1e-5 themselves.
        tolerance = 1e-4 if kind in ("offset", "scaled") else 1e-5
        for name, value, reference in zip(found._fields, found, expected, strict=True):
            assert value.dtype == torch.float32
            error = (value.double() - reference).abs().max() / reference.abs().max().clamp(min=1)
            assert error < tolerance, (kind, name, error)
        whole = torch.cat(_gather(shard.grad), dim=-1)
        # The same real columns, one after the other; padding must have got exact zeros.
        real = torch.cat([whole[:, r * width : (r + 1) * width] for r in range(tp)], -1)
        assert relative_error(real[:, :W], dense.grad) < tolerance, kind
        assert (real[:, W:] == 0).all()
        assert real.sum(-1).abs().max() <= tolerance * real.abs().sum(-1).max(), "sums to 0"


def _gather(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_terms_and_gradient_match_dense_float64(tp, tmp_path):
    """However the vocabulary is split and padded, within float32 rounding."""
    run_ranks(tp, tmp_path, check_terms, 5, 37)


def test_some_ranks_may_hold_padding_only(tmp_path):
    """A vocabulary smaller than the padding leaves the last ranks without a real column."""
    run_ranks(4, tmp_path, check_terms, 1, 2)


def check_collectives():
    calls = []
    original = dist.all_gather
    dist.all_gather = lambda *a, **k: (calls.append("all_gather"), original(*a, **k))[1]
    dist.all_reduce = lambda *a, **k: calls.append("all_reduce")
    logits = torch.randn(3, 8).requires_grad_()
    terms = vocab_parallel_kl_terms(logits, torch.randn(3, 8), tp_group=dist.group.WORLD)
    assert calls == ["all_gather"]
    (terms.reverse_kl + terms.forward_kl).sum().backward()
    assert calls == ["all_gather"]


def test_one_collective_forward_none_backward(tmp_path):
    run_ranks(2, tmp_path, check_collectives)


def test_bfloat16_gradient_is_one_rounding_from_float64():
    """The gradient of bf16 logits is rounded to bf16 once, after all the arithmetic."""
    student, teacher = (x.bfloat16() for x in case_logits("peaked", 4, 33))
    dense = student.double().requires_grad_()
    dense_kl_terms(dense, teacher.double()).reverse_kl.sum().backward()
    low = student.clone().requires_grad_()
    vocab_parallel_kl_terms(low, teacher).reverse_kl.sum().backward()
    assert low.grad.dtype == torch.bfloat16
    # atol: a log-ratio of 20 nats has a float32 rounding of 2e-6, and p ≈ 1 passes it on.
    torch.testing.assert_close(low.grad.double(), dense.grad, rtol=2**-8, atol=5e-6)


def test_leading_dims_are_kept_and_zero_tokens_are_fine():
    terms = vocab_parallel_kl_terms(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    assert terms.reverse_kl.shape == (2, 3)
    empty = torch.randn(0, 8).requires_grad_()
    terms = vocab_parallel_kl_terms(empty, torch.randn(0, 8))
    terms.reverse_kl.sum().backward()
    assert terms.reverse_kl.shape == (0,) and empty.grad.shape == (0, 8)


def test_teacher_padded_wider_than_student_on_one_rank():
    """Unequal padding is fine while the real columns are the same tokens."""
    student, teacher = torch.randn(3, 8), torch.randn(3, 8)
    wide = torch.nn.functional.pad(teacher, (0, 4), value=50.0)
    found = vocab_parallel_kl_terms(student, wide, vocab_size=8)
    torch.testing.assert_close(found.reverse_kl, dense_kl_terms(student, teacher).reverse_kl)


def test_different_tokens_are_refused():
    with pytest.raises(ValueError, match="different tokens"):
        vocab_parallel_kl_terms(torch.randn(3, 8), torch.randn(4, 8))
    with pytest.raises(ValueError, match="Pad both vocabularies"):
        vocab_parallel_kl_terms(torch.randn(3, 8), torch.randn(3, 9))


@pytest.fixture
def terms():
    student, teacher = case_logits("flat", 64, 12)
    return dense_kl_terms(student, teacher * 3)


def test_eopd_without_a_threshold_is_opd(terms):
    """τ = ∞ never opens the gate."""
    never, gate = token_objective(terms, ObjectiveConfig(name="eopd", entropy_threshold=1e9))
    opd, _ = token_objective(terms, ObjectiveConfig(name="opd"))
    assert torch.equal(never, opd) and gate.sum() == 0


def test_eopd_below_every_entropy_adds_forward_kl_everywhere(terms):
    """τ = −1 opens it for every token: the two KLs are added, reverse KL stays."""
    both, gate = token_objective(terms, ObjectiveConfig(name="eopd", entropy_threshold=-1))
    torch.testing.assert_close(both, terms.reverse_kl + terms.forward_kl)
    assert (gate == 1).all()
    fkl, _ = token_objective(terms, ObjectiveConfig(name="fkl"))
    assert torch.equal(fkl, terms.forward_kl)


def test_gate_follows_the_entropy_of_the_same_token(terms):
    """Token by token: the loss differs from reverse KL exactly where the teacher is unsure."""
    threshold = terms.teacher_entropy.median().item()
    loss, gate = token_objective(
        terms, ObjectiveConfig(entropy_threshold=threshold, forward_kl_weight=0.5)
    )
    unsure = terms.teacher_entropy >= threshold
    assert 0 < unsure.sum() < len(unsure)
    assert torch.equal(gate.bool(), unsure)
    expected = terms.reverse_kl + 0.5 * unsure * terms.forward_kl
    torch.testing.assert_close(loss, expected)
