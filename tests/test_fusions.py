"""The fused functions of Megatron-Core that are switched on, against the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl

# Shapes: S tokens, two halves of I columns.
S, I = 64, 48  # noqa: E741
ROUNDING = {torch.float32: 1e-7, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def run_as_written():
    """As parallel/cpu.py has it where no GPU is."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def plain(x_SI2: torch.Tensor, weights_S1: torch.Tensor | None) -> torch.Tensor:
    gate, factor = x_SI2.chunk(2, dim=-1)
    product = F.silu(gate) * factor
    return product if weights_S1 is None else (product * weights_S1).to(x_SI2.dtype)


def fused(x_SI2: torch.Tensor, weights_S1: torch.Tensor | None) -> torch.Tensor:
    if weights_S1 is None:
        return bias_swiglu_impl(x_SI2, None)
    return weighted_bias_swiglu_impl(x_SI2, None, weights_S1)


def results(function, leaves, upstream):
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, [x for x in leaves if x is not None], upstream)]


@pytest.mark.parametrize("is_expert", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_the_plain_formula(dtype, is_expert):
    """Of an MLP, and of an expert with the router's float32 weights: the same bits forward, and a
    gradient within the rounding of the dtype of float64's."""
    torch.manual_seed(0)
    x_SI2, upstream = 2 * torch.randn(S, 2 * I).to(dtype), torch.randn(S, I).to(dtype)
    weights_S1 = torch.rand(S, 1) if is_expert else None
    leaves = (x_SI2, weights_S1)
    found = results(fused, leaves, upstream)
    assert torch.equal(found[0], plain(*leaves))
    wide = [None if x is None else x.double() for x in leaves]
    for ours, right in zip(found, results(plain, wide, upstream.double()), strict=True):
        assert (ours.double() - right).norm() / right.norm() < ROUNDING[dtype]
