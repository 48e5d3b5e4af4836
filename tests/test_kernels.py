"""The compiled sweeps at every width of vector, against the plain ones and the dense formula; their
fallback, and the memory that they need."""

import functools
import platform
from pathlib import Path

import pytest
import torch

from benchmarks.bench_head import bench_head
from megatron_eopd.losses import vocab_parallel_kl_terms
from megatron_eopd.losses.kernels import cpu, eager, kernels_for, operators
from tests.distributed.test_losses import (
    KINDS,
    TEMPERATURES,
    case_logits,
    dense_gradient,
    relative_error,
)

DTYPES = [torch.float32, torch.bfloat16]

# By the flag of an x86 CPU, which is also the compiler's: the widest first.
X86_WIDTHS = {
    "avx512f": ("avx512", 16),
    "avx2": ("avx2", 8),
    "avx": ("avx", 4),
    "sse2": ("sse", 4),
}
WITHOUT = [(), ("avx512f",), ("avx512f", "avx2"), ("avx512f", "avx2", "avx")]


@pytest.fixture(params=WITHOUT, ids=lambda names: "-no-".join(["native", *names]))
def expected_width(request, monkeypatch) -> tuple[str, int]:
    """The sweeps are compiled without these instruction sets; what remains of those of this CPU."""
    on_x86 = platform.machine() == "x86_64"
    if request.param and not on_x86:
        pytest.skip("has one width only")
    flags = [f"-mno-{name}" for name in request.param]
    monkeypatch.setattr(cpu, "library", functools.partial(cpu.library, *flags))
    if not on_x86:
        return cpu.instruction_set()[0], 4
    has = set(Path("/proc/cpuinfo").read_text().split()) - set(request.param)
    return next(width for name, width in X86_WIDTHS.items() if name in has)


def test_vectors_are_as_wide_as_the_registers(expected_width):
    assert cpu.instruction_set() == expected_width


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_matches_dense_float64(expected_width, dtype, kind):
    """Terms and gradient, masked and not: 1e-5, and one rounding of a bfloat16 gradient. Columns
    past the vocabulary are larger than any logit."""
    for num_columns in (1, 37, 2999):
        student, teacher = (x.to(dtype) for x in case_logits(kind, 5, num_columns))
        if kind == "forbidden" and num_columns == 1:
            continue  # nothing but −inf
        weights = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
        for mask in (torch.ones(5).bool(), torch.tensor([1, 0, 1, 1, 0]).bool()):
            expected, expected_grad = dense_gradient(student, teacher, weights * mask)
            padded = [torch.nn.functional.pad(x, (0, 3), value=1e4) for x in (student, teacher)]
            logits = padded[0].requires_grad_()
            found = vocab_parallel_kl_terms(
                logits, padded[1], vocab_size=num_columns, mask=mask, **TEMPERATURES
            )
            (weights[0] * found.reverse_kl + weights[1] * found.forward_kl).sum().backward()
            for value, reference in zip(found, expected, strict=True):
                error = (value - reference * mask).abs() / reference.abs().clamp(min=1)
                assert error.max() < 1e-5
            error = relative_error(logits.grad[:, :num_columns], expected_grad)
            assert error < (1e-5 if dtype == torch.float32 else 2**-8)
            assert (logits.grad[:, num_columns:] == 0).all() and (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_finds_the_top_k(expected_width, dtype):
    """In descending order, equal ones by column, though the last is at the row's very end."""
    teacher = torch.randn(4, 2999, generator=torch.Generator().manual_seed(3)).to(dtype)
    teacher[:, 2998] = teacher[:, 7] = 9.0
    found = cpu.shard_sums(teacher, teacher, None, 2999, (1.0, 1.0), 6)
    values, columns = teacher.double().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found.top_values_NK.double(), values[:, :6])
    assert torch.equal(found.top_columns_NK, columns[:, :6])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_carries_nan(expected_width, dtype):
    """Into the sums of its row and its gradient; the rows beside it stay as they are."""
    for column in (0, 5, 36):
        student, teacher = (x.to(dtype) for x in case_logits("flat", 3, 37))
        student[1, column] = torch.nan
        sums_N8 = cpu.shard_sums(student, teacher, None, 37, (1.0, 1.0), 0).sums_N8
        assert sums_N8.isnan().any(-1).tolist() == [False, True, False]
        weights_N7 = torch.ones(3, 7)
        grad = cpu.shard_gradient(student, teacher, None, 37, (1.0, 1.0), weights_N7, False)
        assert grad.isnan().nonzero().tolist() == [[1, column]]


@pytest.fixture
def fresh_library():
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [0, 1, 255, 256, 1000])
def test_compiled_sweeps_equal_plain_ones(
    expected_width, student_dtype, teacher_dtype, num_columns
):
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
    with pytest.warns(UserWarning, match=r"slower on CPU: .*/broken .* fails:\nno such flag"):
        assert kernels_for(torch.randn(1, 8), torch.randn(1, 8)) is eager


def test_other_types_take_the_plain_form():
    assert kernels_for(torch.randn(1, 8).half(), torch.randn(1, 8)) is eager


def test_chunked_head_needs_a_quarter_of_the_memory():
    """Peak of a whole process, N = 2,048 tokens, V = 151,936, hidden sizes 64 and 128; and the
    same loss and gradients to rounding."""
    head = bench_head()
    assert head["peak ratio"] > 4, head
    assert head["largest relative difference of loss and gradients"] < 1e-5, head


@pytest.mark.parametrize("name", ["shard_sums", "shard_gradient", "shard_gradient_"])
def test_operators_keep_to_their_schema_and_foresee_their_shapes(name):
    """As PyTorch checks it: nothing is written but what the schema says, and tensors without memory
    come out as the real ones do."""
    student, teacher = torch.randn(5, 40).bfloat16(), torch.randn(5, 40)
    mask = torch.tensor([True, True, False, True, True])
    rest = (3,) if name == "shard_sums" else (torch.rand(5, 7),)
    arguments = (student, teacher, mask, 37, 1.0, 0.7, *rest)
    operator = getattr(torch.ops.megatron_eopd, name).default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=checks)


def test_gradient_over_logits_with_gaps_between_columns_gets_memory_of_its_own():
    student, teacher = torch.randn(4, 12)[:, ::2], torch.randn(4, 6)
    arguments = (teacher, None, 6, (1.0, 1.0), torch.rand(4, 7))
    before = student.clone()
    grad = operators.shard_gradient(student, *arguments, inplace=True)
    assert torch.equal(student, before)
    assert torch.equal(grad, operators.shard_gradient(before, *arguments, inplace=False))
