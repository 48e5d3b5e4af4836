"""The chunked LM head: what it adds to Megatron's gradient buffer, and in which precision."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_eopd.losses import dense_kl_terms, vocab_parallel_kl_terms
from megatron_eopd.losses.chunked_head import chunked_head_loss
from tests.ranks import run_ranks

# Shapes: N tokens, V vocabulary, H hidden size.
N, V, H = 37, 96, 16


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, LM head and teacher's logits; the same on all ranks."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((N, H), (V, H), (N, V))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def dense_gradients(hidden_NH, weight_VH, teacher_NV):
    """Of reverse + forward KL, in float64: loss, hidden states' gradient, weight's."""
    leaves = [x.double().requires_grad_() for x in (hidden_NH, weight_VH)]
    terms = dense_kl_terms(F.linear(*leaves), teacher_NV.double())
    loss = (terms.reverse_kl + terms.forward_kl).sum()
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def own_rows(whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(dist.get_world_size(), dim=0)[dist.get_rank()]


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the norm."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def loss_of(hidden_NH, weight, teacher_NV, logits_dtype=None):
    """With teacher's logits cut as the weight's rows."""
    teacher = own_rows(teacher_NV.T).T

    def loss_of_chunk(logits_CV, rows):
        terms = vocab_parallel_kl_terms(
            logits_CV, teacher[rows], tp_group=dist.group.WORLD, inplace_backward=True
        )
        return (terms.reverse_kl + terms.forward_kl).sum()

    return chunked_head_loss(
        hidden_NH,
        weight,
        loss_of_chunk,
        chunk_size=10,
        tp_group=dist.group.WORLD,
        logits_dtype=logits_dtype,
    )


def weight_with_buffer(weight_VH: torch.Tensor, start: float = 0.0) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(own_rows(weight_VH).clone())
    weight.main_grad = torch.full_like(weight, start, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    return weight


def check_main_grad():
    """Twice, onto what is in the buffer."""
    hidden_NH, weight_VH, teacher_NV = problem(torch.float32)
    loss, grad_hidden, grad_weight = dense_gradients(hidden_NH, weight_VH, teacher_NV)
    weight = weight_with_buffer(weight_VH, start=0.5)
    hidden = hidden_NH.clone().requires_grad_()
    for _ in range(2):
        found = loss_of(hidden, weight, teacher_NV)
        found.backward()
        assert error_of(found, loss) < 1e-6
        assert weight.grad_added_to_main_grad
        weight.grad = None  # as the hook of Megatron's wrapper does, which looks at the flag
    assert error_of(weight.main_grad - 0.5, 2 * own_rows(grad_weight)) < 1e-6
    assert error_of(hidden.grad, 2 * grad_hidden) < 1e-6


@pytest.mark.parametrize("tp", [1, 2])
def test_weight_gradient_goes_into_main_grad(tp, tmp_path):
    """What is there, plus the float64 gradient of each microbatch, within 1e-6 of its norm."""
    run_ranks(tp, tmp_path, check_main_grad)


def check_bfloat16():
    """A loss whose gradient of the logits is exact in bfloat16."""
    hidden_NH, weight_VH, upstream_NV = problem(torch.bfloat16)
    expected = own_rows(upstream_NV.double().T) @ hidden_NH.double()
    into_buffer = weight_with_buffer(weight_VH)
    returned = torch.nn.Parameter(into_buffer.detach().clone())
    for weight in (into_buffer, returned):
        chunked_head_loss(
            hidden_NH.clone().requires_grad_(),
            weight,
            lambda logits_CV, rows: (logits_CV * own_rows(upstream_NV.T).T[rows]).sum().float(),
            chunk_size=10,
            tp_group=dist.group.WORLD,
        ).backward()
    exact, rounded = (error_of(x, expected) for x in (into_buffer.main_grad, returned.grad))
    assert exact < 1e-6 < 1e-3 < rounded, (exact, rounded)


@pytest.mark.parametrize("tp", [1, 2])
def test_no_rounding_of_the_sum_to_bfloat16(tp, tmp_path):
    """Exact beside float64, where a gradient that is handed over in bfloat16 has 8 bits."""
    run_ranks(tp, tmp_path, check_bfloat16)


def check_left_alone():
    hidden_NH, weight_VH, teacher_NV = problem(torch.float32)
    weight = weight_with_buffer(weight_VH)
    with torch.no_grad():
        loss_of(hidden_NH, weight, teacher_NV)
    assert not weight.main_grad.any() and not weight.grad_added_to_main_grad
    loss = loss_of(hidden_NH.requires_grad_(), weight, teacher_NV)
    with pytest.raises(RuntimeError, match="gradient of the loss is not 1"):
        (2 * loss).backward()
    frozen = weight.detach()
    frozen.main_grad = torch.zeros_like(frozen)
    loss_of(hidden_NH, frozen, teacher_NV).backward()
    assert not frozen.main_grad.any() and hidden_NH.grad.any()


def test_an_evaluation_or_a_frozen_head_adds_nothing(tmp_path):
    """And a loss that is scaled afterwards is refused: its gradient is in the buffer already."""
    run_ranks(1, tmp_path, check_left_alone)


def check_float32_logits():
    hidden_NH, weight_VH, teacher_NV = problem(torch.bfloat16)
    teacher_NV = teacher_NV.float()
    expected = dense_gradients(hidden_NH, weight_VH, teacher_NV)
    hidden = hidden_NH.clone().requires_grad_()
    weight = weight_with_buffer(weight_VH)
    loss = loss_of(hidden, weight, teacher_NV, torch.float32)
    loss.backward()
    found = (loss.detach(), hidden.grad, weight.main_grad)
    expected = (expected[0], expected[1], own_rows(expected[2]))
    # The loss sees no rounding at all. Gradients: one of each element, to 8 bits, and no sum's; the
    # hidden states' is handed over in bfloat16 by each rank.
    for ours, right, tolerance in zip(found, expected, (1e-6, 8e-3, 4e-3), strict=True):
        assert error_of(ours, right) < tolerance


@pytest.mark.parametrize("tp", [1, 2])
def test_float32_logits_of_a_bfloat16_model(tp, tmp_path):
    """The loss is exact to 1e-6 beside float64 with the same weights."""
    run_ranks(tp, tmp_path, check_float32_logits)
