"""The compiled sweeps against the plain ones, their fallback, and the memory that they need."""

import pytest
import torch

from megatron_eopd.losses import vocab_parallel_kl_terms
from megatron_eopd.losses.kernels import cpu, eager, kernels_for
from tools.bench_head import bench_head

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def fresh_library():
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [0, 1, 255, 256, 1000])
def test_compiled_sweeps_equal_plain_ones(student_dtype, teacher_dtype, num_columns):
    """Sums, top k and gradient, masked and not, within float32 rounding."""
    generator = torch.Generator().manual_seed(4)
    student = (5 * torch.randn(6, 1010, generator=generator)).to(student_dtype)
    teacher = (5 * torch.randn(6, 1010, generator=generator) - 50).to(teacher_dtype)
    student[:, 3::7] = teacher[:, 3::7] = -torch.inf
    weights = torch.randn(6, 7, generator=generator)
    weights[:, 0], weights[:, 1], weights[:, 2:4] = 20.0, -30.0, 3.0
    for mask in (None, torch.tensor([1, 0, 1, 1, 0, 1]).bool()):
        arguments = (student, teacher, mask, num_columns, (0.7, 1.4))
        compiled, plain = (kernel.shard_sums(*arguments, 5) for kernel in (cpu, eager))
        torch.testing.assert_close(compiled.sums_N8, plain.sums_N8, rtol=2e-6, atol=1e-5)
        for found, expected in zip(compiled[1:], plain[1:], strict=True):
            assert torch.equal(found, expected)
        gradients = [k.shard_gradient(*arguments, weights, False) for k in (cpu, eager)]
        tolerance = {"rtol": 1e-5, "atol": 1e-6}
        if student_dtype == torch.bfloat16:
            tolerance = {"rtol": 2**-7, "atol": 1e-6}
        torch.testing.assert_close(*gradients, **tolerance)
        inplace = student.clone()
        assert cpu.shard_gradient(inplace, *arguments[1:], weights, True) is inplace
        assert torch.equal(inplace, gradients[0])


def test_the_result_does_not_depend_on_the_number_of_threads():
    logits = torch.randn(37, 3000), torch.randn(37, 3000)
    assert kernels_for(*logits) is cpu, "this test wants a C++ compiler"
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            student = logits[0].clone().requires_grad_()
            terms = vocab_parallel_kl_terms(student, logits[1])
            (terms.reverse_kl + terms.forward_kl).sum().backward()
            results.append((*terms, student.grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_without_a_compiler_the_plain_form_takes_over(fresh_library, monkeypatch):
    """With a warning that says what it costs."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match=r"slower on CPU: no C\+\+ compiler"):
        assert kernels_for(torch.randn(1, 8), torch.randn(1, 8)) is eager


def test_a_compiler_that_fails_is_quoted(fresh_library, monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match="does not compile cpu.cpp:\nno such flag"):
        assert kernels_for(torch.randn(1, 8), torch.randn(1, 8)) is eager


def test_other_types_take_the_plain_form():
    assert kernels_for(torch.randn(1, 8).half(), torch.randn(1, 8)) is eager


def test_chunked_head_needs_a_quarter_of_the_memory():
    """Peak of a whole process, N = 2,048 tokens, V = 151,936, hidden sizes 64 and 128; and the
    same loss and gradients to rounding."""
    head = bench_head()
    assert head["peak ratio"] > 4, head
    assert head["largest relative difference of loss and gradients"] < 1e-5, head
