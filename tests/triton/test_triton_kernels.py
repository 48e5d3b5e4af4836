"""The Triton kernels against the eager ones, on CPU in Triton's interpreter.

The checks take the device as an argument; test_triton_gpu.py runs them on CUDA.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_eopd.losses import dense_kl_terms, kernels, vocab_parallel
from megatron_eopd.losses.kernels import LOWEST, ShardSums, eager

triton = pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
triton_gpu = pytest.importorskip("megatron_eopd.losses.kernels.triton_gpu")

# Shapes: N tokens, V columns, K top-k.

INTERPRETED = not isinstance(triton_gpu._top_k_kernel, triton.JITFunction)

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED,
        reason="Triton was imported without its interpreter: set TRITON_INTERPRET=1 and run "
        "tests/triton as a pytest process of its own",
    ),
    # NumPy about the garbage in lanes that the kernels throw away.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

KINDS = ["flat", "peaked", "scaled", "offset", "forbidden"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURES = (0.7, 1.3)
STUDENT_SUMS, TEACHER_SUMS = [0, 2, 7], [1, 3, 6]
"""Those that speak of one model only."""


def case_logits(
    kind: str, dtype: torch.dtype, device: str, shape: tuple[int, int] = (4, 1403)
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's has more columns; both end in garbage larger than any logit."""
    N, V = shape
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(N, V, generator=generator) for _ in range(2))
    if kind == "scaled":
        student, teacher = 30 * student, 30 * teacher
    elif kind == "offset":
        student, teacher = student + 100, teacher - 100
    elif kind == "peaked":
        student[:, 0] += 20
        teacher[:, V // 2] += 20
    elif kind == "forbidden":  # columns that neither model can write, among them whole tiles
        student[:, ::3] = teacher[:, ::3] = -torch.inf
        student[:, :600] = teacher[:, :600] = -torch.inf
    else:
        assert kind == "flat"
    garbage = torch.full((N, 7), 1e4)
    student, teacher = torch.cat([student, garbage[:, :2]], -1), torch.cat([teacher, garbage], -1)
    return student.to(device, dtype), teacher.to(device, dtype)


def assert_same_sums(found: torch.Tensor, expected: torch.Tensor):
    # 1e-5 of a sum's terms: logits of size 100 carry a float32 rounding of 1e-5 themselves. A logit
    # of −inf that only one model has counts as about −1e30, whose factor says nothing.
    found, expected = (x.cpu().double().clamp(-1e9, 1e9) for x in (found, expected))
    size = expected.abs().amax(-1, keepdim=True).clamp(min=1)
    assert ((found - expected).abs() <= 1e-5 * size).all(), (found, expected)


def assert_same_shard(found: ShardSums, expected: ShardSums):
    assert_same_sums(found.sums_N8, expected.sums_N8)
    assert torch.equal(found.top_values_NK.cpu(), expected.top_values_NK.cpu())
    assert torch.equal(found.top_columns_NK.cpu(), expected.top_columns_NK.cpu())


def gradient_weights(sums_N8: torch.Tensor) -> torch.Tensor:
    """[N, 7], as the backward pass would have them; random upstream gradients."""
    upstream = torch.randn(len(sums_N8), 3, generator=torch.Generator().manual_seed(5))
    # At least 1 over the whole vocabulary, whatever this shard has.
    m_and_log_z = torch.cat([sums_N8[:, :2], sums_N8[:, 2:4].clamp(min=1).log()], -1)
    return torch.cat([m_and_log_z, upstream.to(sums_N8.device)], -1)


def assert_same_gradient(found: torch.Tensor, expected: torch.Tensor):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    # Once rounded to the dtype; the interpreter cuts bfloat16 where hardware rounds it.
    ulp = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[found.dtype]
    found, expected = found.cpu().double(), expected.cpu().double()
    # A subnormal float16 has no relative precision.
    tiny = 2**-24 if ulp == 2**-10 else 0.0
    size = expected.abs().amax(-1, keepdim=True)
    assert ((found - expected).abs() <= ulp * expected.abs() + 2e-5 * size + tiny).all()


def check_both_sweeps(student, teacher, mask, num_columns, temperatures=TEMPERATURES, top_k=5):
    arguments = (student, teacher, mask, num_columns, temperatures)
    expected = eager.shard_sums(*arguments, top_k)
    assert_same_shard(triton_gpu.shard_sums(*arguments, top_k), expected)
    weights = gradient_weights(expected.sums_N8)
    found = triton_gpu.shard_gradient(*arguments, weights, inplace=False)
    assert_same_gradient(found, eager.shard_gradient(*arguments, weights, inplace=False))
    kept = student.clone()
    written = triton_gpu.shard_gradient(*arguments, weights, inplace=True)
    if student.stride(-1) == 1:
        assert written.data_ptr() == student.data_ptr() and written.stride() == student.stride()
    assert torch.equal(written, found)
    student.copy_(kept)


def check_kind(kind: str, dtypes: tuple[torch.dtype, torch.dtype], device: str):
    student, _ = case_logits(kind, dtypes[0], device)
    _, teacher = case_logits(kind, dtypes[1], device)
    mask = torch.tensor([True, True, False, True], device=device)
    check_both_sweeps(student, teacher, mask, 1403)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_sweeps_match_the_eager_ones(kind, dtype):
    """Sums, top k and gradient, out of place and in place."""
    check_kind(kind, (dtype, dtype), "cpu")


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_student_and_teacher_may_have_different_dtypes(dtypes):
    check_kind("flat", dtypes, "cpu")


def check_numbers_of_columns(device: str):
    for num_columns in (0, 1, 2, 255, 256, 257, 512, 1024):
        logits = case_logits("flat", torch.bfloat16, device, (2, 1100))
        check_both_sweeps(*logits, None, num_columns)
    check_both_sweeps(*case_logits("flat", torch.float32, device, (2, 1)), None, 1, top_k=1)


def test_any_number_of_columns_may_be_real():
    """None, one, a part of a tile, whole tiles; the padding's garbage enters nothing."""
    check_numbers_of_columns("cpu")


def check_numbers_of_tokens(device: str):
    student, teacher = case_logits("flat", torch.float32, device, (3, 300))
    for num_tokens in (0, 1, 2):
        check_both_sweeps(student[:num_tokens], teacher[:num_tokens], None, 300)
    nobody = torch.zeros(3, dtype=torch.bool, device=device)
    check_both_sweeps(torch.full_like(student, torch.nan), teacher, nobody, 300)


def test_any_number_of_tokens_may_count():
    """Zero tokens, one, and all of them masked."""
    check_numbers_of_tokens("cpu")


def check_masked_garbage(device: str):
    student, teacher = case_logits("flat", torch.bfloat16, device)
    clean = [x.clone() for x in (student, teacher)]
    mask = torch.tensor([True, False, True, False], device=device)
    student[1::2] = torch.nan
    teacher[1::2] = torch.inf
    arguments = (mask, 1403, TEMPERATURES)
    expected = eager.shard_sums(*clean, *arguments, 5)
    found = triton_gpu.shard_sums(student, teacher, *arguments, 5)
    assert_same_shard(found, expected)
    assert (found.sums_N8[1::2] == 0).all() and (found.top_values_NK[1::2] == LOWEST).all()
    grad = triton_gpu.shard_gradient(
        student, teacher, *arguments, gradient_weights(expected.sums_N8), inplace=True
    )
    assert (grad[1::2] == 0).all() and grad[::2].isfinite().all()


def test_logits_of_masked_tokens_enter_nothing():
    """Not even NaN: their sums and gradient are 0."""
    check_masked_garbage("cpu")


def check_non_finite(device: str):
    student, teacher = case_logits("flat", torch.float32, device, (9, 700))
    student[0, 100] = teacher[1, 100] = torch.nan
    student[2, 100] = teacher[3, 100] = torch.inf
    student[4, 690] = teacher[5, 690] = torch.nan  # in the last tile, which is not a whole one
    student[6, :700] = teacher[7, :700] = torch.nan
    sums = triton_gpu.shard_sums(student, teacher, None, 700, TEMPERATURES, 5).sums_N8.cpu()
    for own, rows in ((STUDENT_SUMS, [0, 2, 4, 6]), (TEACHER_SUMS, [1, 3, 5, 7])):
        bad = ~sums[:, own].isfinite().all(-1)
        assert bad.nonzero().flatten().tolist() == rows


def test_logits_that_are_not_finite_show_in_the_sums_of_their_rows_only():
    """In any part of the row, though maxima drop NaN, and only in the sums of that model."""
    check_non_finite("cpu")


def check_forbidden_by_one(device: str):
    student, teacher = case_logits("flat", torch.float32, device, (4, 700))
    student[0, 50], teacher[1, 50] = -torch.inf, -torch.inf
    student[2, :512], teacher[3, :512] = -torch.inf, -torch.inf
    check_both_sweeps(student, teacher, None, 700)


def test_columns_that_one_model_forbids_make_the_divergence_impossible():
    """One column or whole tiles of −inf: finite sums, of a size that only −inf has."""
    check_forbidden_by_one("cpu")


def check_shard_without_probability(device: str):
    student, teacher = case_logits("flat", torch.float32, device, (2, 300))
    student[:], teacher[1] = -torch.inf, -torch.inf
    check_both_sweeps(student, teacher, None, 300)


def test_a_shard_may_have_no_probability_at_all():
    """Its maximum is LOWEST and its sums are finite; another rank may hold all the rest."""
    check_shard_without_probability("cpu")


def check_segments(device: str, monkeypatch):
    mask = torch.tensor([True, True, False], device=device)
    for kind in ("flat", "offset", "forbidden"):
        student, teacher = case_logits(kind, torch.bfloat16, device, (3, 1403))
        arguments = (student, teacher, mask, 1403, TEMPERATURES, 5)
        monkeypatch.setattr(triton_gpu, "_segments", lambda *_: (1, 8192))
        whole = triton_gpu.shard_sums(*arguments)
        monkeypatch.setattr(triton_gpu, "_segments", lambda *_: (3, 512))
        assert_same_shard(triton_gpu.shard_sums(*arguments), whole)


def test_several_segments_are_equal_to_one(monkeypatch):
    """However a row is split over programs, as far as float32 rounds."""
    check_segments("cpu", monkeypatch)


def test_segments_cover_every_column(monkeypatch):
    """Whatever the number of tokens: no column left out, no segment empty, all of them aligned."""
    logits = torch.empty(1, 1, device="meta")
    for num_columns in (0, 1, 8192, 8193, 151_936):
        segments, columns = triton_gpu._segments(logits, num_columns)
        assert (segments - 1) * columns < max(num_columns, 1) <= segments * columns
        assert columns % triton_gpu.SEGMENT_STEP == 0


def check_top_k_ties(device: str):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        # Some 40 columns have the largest value, and a group of 256 about 8 of them.
        teacher = torch.randint(-30, 3, (4, 1403), generator=generator).to(device, dtype)
        teacher[1] = -torch.inf
        teacher[1, [5, 900]] = 1.0
        teacher[2] = -0.0
        teacher[2, ::2] = 0.0
        student = torch.zeros_like(teacher)
        for num_columns, top_k in ((1400, 1), (1400, 12), (3, 5)):
            arguments = (student, teacher, None, num_columns, (1.0, 1.0), top_k)
            found = triton_gpu.shard_sums(*arguments)
            assert_same_shard(found, eager.shard_sums(*arguments))
            order = teacher[:, :num_columns].float().sort(dim=-1, descending=True, stable=True)
            count = min(top_k, num_columns)
            rows = [0, 2, 3]  # those without −inf
            assert torch.equal(found.top_columns_NK[rows, :count], order.indices[rows, :count])
            if top_k == 12:
                assert found.top_columns_NK[1].tolist() == [5, 900] + 10 * [0]


def test_equal_logits_are_ranked_by_column():
    """Within a group and across groups; −0 equals 0; −inf is never among them, nor is padding."""
    check_top_k_ties("cpu")


def check_strides(device: str):
    student, teacher = case_logits("flat", torch.bfloat16, device, (2, 700))
    for make in (
        lambda x: torch.cat([x, x], -1)[:, : x.shape[1]],  # rows wider than the view
        lambda x: torch.stack([x, x], 1)[:, 1],
        lambda x: x.t().contiguous().t(),
    ):
        wide = make(student)
        storage = wide._base.clone()
        check_both_sweeps(wide, make(teacher), None, 690)
        assert torch.equal(wide._base, storage), "columns beside the view were written"


def test_rows_and_columns_may_be_strided():
    """The gradient in place keeps to the rows of the view; elsewhere it has the same values."""
    check_strides("cpu")


def check_end_to_end(device: str, monkeypatch):
    """Values and gradients of the whole loss function, against autograd of its definition."""
    monkeypatch.setattr(kernels, "kernels_for", lambda *_: triton_gpu)
    N, V, top_k = 5, 611, 4
    student, teacher = (x[:, :V] for x in case_logits("peaked", torch.float32, device, (N, V)))
    mask = torch.tensor([True, True, False, True, True], device=device)
    sampled = torch.tensor([0, 1, 2, 610, 300], device=device)
    upstream = torch.randn(4, N, generator=torch.Generator().manual_seed(1)).to(device)
    upstream[:, ~mask] = 0

    dense = student.double().requires_grad_()
    at = {"student_temperature": 0.7, "teacher_temperature": 1.3}
    terms = dense_kl_terms(dense, teacher.double(), **at)
    student_logprobs = (dense / 0.7).log_softmax(-1)
    top_ids = teacher.topk(top_k).indices
    loss = (upstream[0] * terms.reverse_kl + upstream[1] * terms.forward_kl).sum()
    loss = loss + (upstream[2] * student_logprobs.gather(-1, sampled[:, None])[:, 0]).sum()
    loss = loss + (upstream[3, :, None] * student_logprobs.gather(-1, top_ids)).sum()
    loss.backward()

    padded = torch.nn.functional.pad(student, (0, 5), value=1e4).requires_grad_()
    found = vocab_parallel.vocab_parallel_terms(
        padded,
        torch.nn.functional.pad(teacher, (0, 2), value=1e4),
        vocab_size=V,
        **at,
        mask=mask,
        sampled_ids=sampled,
        top_k=top_k,
    )
    found_loss = (upstream[0] * found.kl.reverse_kl + upstream[1] * found.kl.forward_kl).sum()
    found_loss = found_loss + (upstream[2] * found.picked.sampled_student_logprobs).sum()
    found_loss = found_loss + (upstream[3, :, None] * found.picked.top_student_logprobs).sum()
    found_loss.backward()

    assert found.non_finite_R2.tolist() == [[0, 0]]
    assert torch.equal(found.picked.top_ids[mask], top_ids[mask])
    for value, reference in zip(found.kl, terms, strict=True):
        torch.testing.assert_close(value[mask].double(), reference[mask], rtol=1e-5, atol=1e-5)
        assert (value[~mask] == 0).all()
    assert (padded.grad[:, V:] == 0).all() and (padded.grad[~mask] == 0).all()
    torch.testing.assert_close(padded.grad[:, :V].double(), dense.grad, rtol=1e-5, atol=1e-5)


def test_the_whole_loss_matches_dense_float64(monkeypatch):
    check_end_to_end("cpu", monkeypatch)


def compile_for_hopper():
    """Without a GPU, down to machine code. Prints what was checked."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"mask": "*i1", "sums": "*fp32", "group_maxima": "*fp32", "weights": "*fp32"}
    pointers |= {"values": "*fp32", "columns": "*i64"}
    reals = ("student_scale", "teacher_scale", "inverse_temperature")
    options = {"num_warps": 4, "enable_fp_fusion": True}
    tile = {"COLUMNS_AT_ONCE": 8, "STEPS": 2, "LANES": 128, "STAGES": 1}
    for kernel, constants in (
        (triton_gpu._sums_kernel.fn, tile),
        (triton_gpu._sums_kernel.fn, tile | {"STAGES": 3, "mask": None, "group_maxima": None}),
        (triton_gpu._top_k_kernel, {"GROUPS": 1024, "GROUP": 256}),
        (triton_gpu._gradient_kernel, {"BLOCK": 4096}),
    ):
        names = kernel.arg_names
        logits = dict.fromkeys(("student", "teacher", "out"), "*bf16")
        types = {n: (logits | pointers).get(n, "fp32" if n in reals else "i32") for n in names}
        # As for a real call: addresses and sizes are multiples of 16, a vocabulary need not be.
        aligned = [n for n in names if types[n][0] == "*" or n.endswith(("_stride", "width"))]
        aligned = [*aligned, *(n for n in names if n == "segment_columns")]
        source = ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in constants else types[n] for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]
        wide = compiled.asm["ptx"].count("ld.global.v4.b32")
        wide += compiled.asm["ptx"].count("cp.async.cg.shared.global")
        print(kernel.__name__, sorted(constants), wide)
        assert wide or kernel is triton_gpu._top_k_kernel, "logits must be loaded 16 bytes at once"


def test_kernels_compile_for_hopper_with_wide_loads(tmp_path):
    """Down to machine code; 16 bytes per load although the vocabulary may have any size."""
    root = Path(__file__).parents[2]
    # A process of its own: in this one the kernels are interpreted.
    subprocess.run(
        [sys.executable, "-c", f"import {__name__} as tests; tests.compile_for_hopper()"],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=root,
        check=True,
    )
