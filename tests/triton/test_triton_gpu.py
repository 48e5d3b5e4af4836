"""The checks of test_triton_kernels.py on CUDA, compiled, and what only real sizes show."""

import pytest
import torch

from megatron_eopd.losses.kernels import eager
from tests.triton import test_triton_kernels as checks
from tests.triton.test_triton_kernels import DTYPES, INTERPRETED, KINDS, TEMPERATURES, triton_gpu

# Shapes: N tokens, V columns.

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 is set: nothing is compiled"),
]

QWEN3_VOCABULARY = 151_936


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_sweeps_match_the_eager_ones(kind, dtype):
    """Sums, top k and gradient, out of place and in place."""
    checks.check_kind(kind, (dtype, dtype), "cuda")


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_student_and_teacher_may_have_different_dtypes(dtypes):
    checks.check_kind("flat", dtypes, "cuda")


@pytest.mark.parametrize(
    "check",
    [
        checks.check_numbers_of_columns,
        checks.check_numbers_of_tokens,
        checks.check_masked_garbage,
        checks.check_non_finite,
        checks.check_forbidden_by_one,
        checks.check_shard_without_probability,
        checks.check_top_k_ties,
        checks.check_strides,
    ],
)
def test_edges_hold_compiled_too(check):
    """What the interpreter showed on CPU."""
    check("cuda")


@pytest.mark.parametrize("check", [checks.check_segments, checks.check_end_to_end])
def test_whole_rows_hold_compiled_too(check, monkeypatch):
    """What the interpreter showed on CPU."""
    check("cuda", monkeypatch)


@pytest.mark.parametrize("num_tokens", [3, 300, 4096])
def test_a_real_vocabulary_matches_eager(num_tokens):
    """Split over many programs, over a few, and not at all; columns beyond the vocabulary."""
    student, teacher = (
        torch.randn(num_tokens, QWEN3_VOCABULARY, device="cuda", dtype=torch.bfloat16) * 3
        for _ in range(2)
    )
    mask = torch.rand(num_tokens, device="cuda") > 0.3
    checks.check_both_sweeps(student, teacher, mask, 151_669, TEMPERATURES, top_k=64)


def test_offsets_beyond_32_bits_reach_their_rows():
    """The last rows of logits with more than 2^31 elements are read and written where they are."""
    num_tokens = 2**31 // QWEN3_VOCABULARY + 8
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of device memory")
    student, teacher = (
        torch.zeros(num_tokens, QWEN3_VOCABULARY, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    ends = torch.tensor([0, 1, num_tokens - 2, num_tokens - 1], device="cuda")
    for logits in (student, teacher):
        logits[ends] = torch.randn(4, QWEN3_VOCABULARY, device="cuda").bfloat16()
    few = (student[ends], teacher[ends], None, QWEN3_VOCABULARY, TEMPERATURES)
    expected = eager.shard_sums(*few, 3)
    found = triton_gpu.shard_sums(student, teacher, *few[2:], 3)
    checks.assert_same_shard(type(found)(*(x[ends] for x in found)), expected)
    weights = checks.gradient_weights(found.sums_N8)
    expected_gradient = eager.shard_gradient(*few, weights[ends], inplace=False)
    grad = triton_gpu.shard_gradient(student, teacher, *few[2:], weights, inplace=True)
    checks.assert_same_gradient(grad[ends], expected_gradient)


def test_nothing_waits_for_the_device():
    """Neither sweep reads a value back, with a mask and a top k, once its kernels are compiled."""
    student, teacher = checks.case_logits("flat", torch.bfloat16, "cuda")
    mask = torch.tensor([True, True, False, True], device="cuda")
    arguments = (student, teacher, mask, 1403, TEMPERATURES)

    # Before the watch: the random upstream gradients are copied to the device.
    weights = checks.gradient_weights(triton_gpu.shard_sums(*arguments, 5).sums_N8)

    def sweep():
        triton_gpu.shard_sums(*arguments, 5)
        triton_gpu.shard_gradient(*arguments, weights, inplace=False)

    sweep()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sweep()
    finally:
        torch.cuda.set_sync_debug_mode("default")
