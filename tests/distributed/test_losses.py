"""The vocab-parallel KL terms against the dense float64 formula, values and gradients."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eopd.losses import dense_kl_terms, kernels, vocab_parallel_kl_terms
from megatron_eopd.losses.kernels import eager
from megatron_eopd.losses.vocab_parallel import NonFiniteLogitsError, vocab_parallel_terms
from megatron_eopd.parallel.layout import pad_vocab_size
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
TEMPERATURES = {"student_temperature": 0.7, "teacher_temperature": 1.3}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Against the largest entry: single entries of a gradient pass through 0."""
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def cut(whole: torch.Tensor, width: int, rank: int) -> torch.Tensor:
    """This rank's columns; padding is garbage on purpose, larger than any logit."""
    world = dist.get_world_size()
    padded = torch.full((whole.shape[0], width * world), 1e4, dtype=whole.dtype)
    padded[:, : whole.shape[1]] = whole
    return padded[:, rank * width : (rank + 1) * width].clone()


def join(shard: torch.Tensor, num_columns: int) -> torch.Tensor:
    """The real columns of all ranks' shards; padding must hold exact zeros."""
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard)
    whole = torch.cat(parts, dim=-1)
    assert (whole[:, num_columns:] == 0).all()
    return whole[:, :num_columns]


def dense_gradient(student, teacher, weights):
    """The four terms and the gradient of weights[0]·reverse + weights[1]·forward, float64."""
    dense = student.double().requires_grad_()
    terms = dense_kl_terms(
        # A finite stand-in: autograd of the dense formula makes NaN of −inf − (−inf).
        dense.clamp(min=-1e4),
        teacher.double().clamp(min=-1e4),
        **TEMPERATURES,
    )
    (weights[0] * terms.reverse_kl + weights[1] * terms.forward_kl).sum().backward()
    return terms, dense.grad


def check_terms(N: int, W: int):
    tp, rank = dist.get_world_size(), dist.get_rank()
    width = -(-W // tp) + 3
    for kind in KINDS:
        student, teacher = case_logits(kind, N, W)
        weights = torch.randn(2, N, generator=torch.Generator().manual_seed(1))
        expected, expected_grad = dense_gradient(student, teacher, weights)
        for inplace in (False, True):
            shard = cut(student, width, rank).requires_grad_()
            found = vocab_parallel_kl_terms(
                shard,
                cut(teacher, width, rank),
                tp_group=dist.group.WORLD,
                vocab_size=W,
                inplace_backward=inplace,
                **TEMPERATURES,
            )
            (weights[0] * found.reverse_kl + weights[1] * found.forward_kl).sum().backward()
            assert (shard.grad.data_ptr() == shard.data_ptr()) == (inplace and N > 0)
            for name, value, reference in zip(found._fields, found, expected, strict=True):
                assert value.dtype == torch.float32
                # Relative to the largest of nats and 1: a KL near 0 is a difference of entropies.
                assert ((value - reference).abs() / reference.abs().clamp(min=1)).max() < 1e-5, name
            grad = join(shard.grad, W)
            assert relative_error(grad, expected_grad) < 1e-5, kind
            assert grad.sum(-1).abs().max() <= 1e-5 * grad.abs().sum(-1).max(), "sums to 0"


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_terms_and_gradient_match_dense_float64(tp, tmp_path):
    """However the vocabulary is split and padded, in place or not, within float32 rounding."""
    run_ranks(tp, tmp_path, check_terms, 5, 37)


@pytest.mark.parametrize("tp", [1, 4])
def test_wide_vocabularies_match_dense_float64(tp, tmp_path):
    """Wider than any block, and no multiple of TP × 128."""
    run_ranks(tp, tmp_path, check_terms, 3, 2999)


def test_some_ranks_may_hold_padding_only(tmp_path):
    """A vocabulary smaller than the padding leaves the last ranks without a real column."""
    run_ranks(4, tmp_path, check_terms, 1, 2)


def check_eager():
    """The form without a compiler, put in the place of the compiled one."""
    kernels.kernels_for = lambda *_: eager
    check_terms(5, 37)
    check_terms(3, 2999)


def test_terms_match_dense_float64_without_a_compiler(tmp_path):
    run_ranks(2, tmp_path, check_eager)


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(1, 4),
    W=st.integers(1, 600),
    scale=st.floats(0.01, 30),
    offset=st.floats(-100, 100),
    temperatures=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)),
    seed=st.integers(0, 1000),
)
def test_any_logits_match_dense_float64(N, W, scale, offset, temperatures, seed):
    """Any scale, offset, width and temperatures; also the identity H = CE(p, q) − forward KL."""
    generator = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(N, W, generator=generator) + offset).requires_grad_()
    teacher = scale * torch.randn(N, W, generator=generator) - offset
    options = dict(zip(("student_temperature", "teacher_temperature"), temperatures, strict=True))
    found = vocab_parallel_kl_terms(student, teacher, **options)
    (found.reverse_kl + found.forward_kl).sum().backward()
    dense = student.detach().double().requires_grad_()
    expected = dense_kl_terms(dense, teacher.double(), **options)
    (expected.reverse_kl + expected.forward_kl).sum().backward()
    for value, reference in zip(found, expected, strict=True):
        assert ((value - reference).abs() / reference.abs().clamp(min=1)).max() < 1e-5
    # A token's gradient can cancel (student = teacher, or one token): its size is then rounding.
    scale_of_terms = max(dense.grad.abs().max(), 0.1 * expected.reverse_kl.abs().max(), 0.1)
    assert (student.grad - dense.grad).abs().max() < 1e-5 * scale_of_terms
    log_q = (dense / temperatures[0]).log_softmax(-1)
    p = (teacher.double() / temperatures[1]).softmax(-1)
    cross_entropy = -(p * log_q).sum(-1)
    entropy = cross_entropy - found.forward_kl
    assert ((found.teacher_entropy - entropy).abs() / cross_entropy.clamp(min=1)).max() < 1e-5


def check_mask():
    rank = dist.get_rank()
    student, teacher = case_logits("flat", 6, 300)
    for mask in (torch.tensor([1, 0, 1, 1, 0, 0]).bool(), torch.zeros(6).bool()):
        bad = student.clone()
        bad[~mask] = torch.nan  # would show if it were read
        shard = cut(bad, 160, rank).requires_grad_()
        terms = vocab_parallel_terms(
            shard,
            cut(teacher, 160, rank),
            tp_group=dist.group.WORLD,
            vocab_size=300,
            mask=mask,
            sampled_ids=torch.arange(6),
            top_k=3,
        )
        picked = terms.picked
        loss = terms.kl.reverse_kl + terms.kl.forward_kl + picked.sampled_student_logprobs
        (loss + picked.top_student_logprobs.sum(-1)).sum().backward()
        assert all((x[~mask] == 0).all() for x in terms.kl)
        assert (shard.grad[~mask] == 0).all() and shard.grad[mask].isfinite().all()
        assert (shard.grad[mask] != 0).any() or not mask.any()
        assert terms.non_finite_R2.sum() == 0
        if mask.any():
            alone = dense_kl_terms(student[mask], teacher[mask])
            torch.testing.assert_close(terms.kl.reverse_kl[mask], alone.reverse_kl)


def test_masked_tokens_are_not_read_and_get_zeros(tmp_path):
    """Also when every token is masked."""
    run_ranks(2, tmp_path, check_mask)


def check_collectives():
    calls = []
    original = dist.all_gather
    dist.all_gather = lambda *a, **k: (calls.append("all_gather"), original(*a, **k))[1]
    for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter"):
        setattr(dist, name, lambda *a, name=name, **k: calls.append(name))
    logits = torch.randn(3, 8).requires_grad_()
    group = dist.group.WORLD
    terms = vocab_parallel_kl_terms(logits, torch.randn(3, 8), tp_group=group)
    assert calls == ["all_gather"]
    (terms.reverse_kl + terms.forward_kl).sum().backward()
    assert calls == ["all_gather"]
    calls.clear()
    ids = torch.tensor([1, 9, 15])
    for support in ("teacher", "student", "union"):
        terms = vocab_parallel_terms(
            logits,
            torch.randn(3, 8),
            tp_group=group,
            sampled_ids=ids,
            top_k=3,
            top_k_of=support,
        )
        terms.picked.top_student_logprobs.sum().backward()
    assert calls == ["all_gather"] * 3


def test_one_collective_forward_none_backward(tmp_path):
    """Whatever rides along."""
    run_ranks(2, tmp_path, check_collectives)


@pytest.mark.parametrize("kind", ["flat", "peaked", "scaled"])
def test_bfloat16_gradient_is_one_rounding_from_float64(kind):
    """The gradient of bf16 logits is rounded to bf16 once, after all the arithmetic."""
    student, teacher = (x.bfloat16() for x in case_logits(kind, 4, 300))
    dense = student.double().requires_grad_()
    expected = dense_kl_terms(dense, teacher.double())
    (expected.reverse_kl + expected.forward_kl).sum().backward()
    low = student.clone().requires_grad_()
    found = vocab_parallel_kl_terms(low, teacher)
    (found.reverse_kl + found.forward_kl).sum().backward()
    assert low.grad.dtype == torch.bfloat16 and found.reverse_kl.dtype == torch.float32
    torch.testing.assert_close(found.reverse_kl.double(), expected.reverse_kl, rtol=1e-5, atol=1e-5)
    # rtol: half a unit in bf16's last place, and float32's rounding before it. atol: a log-ratio of
    # c nats carries a float32 rounding of 6e-8·c, and p ≈ 1 passes it on.
    atol = 2e-7 * expected.reverse_kl.max().item()
    torch.testing.assert_close(low.grad.double(), dense.grad, rtol=2**-8 * 1.01, atol=atol)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16",)])
def test_student_and_teacher_may_differ_in_type(dtypes):
    student, teacher = case_logits("flat", 3, 300)
    low, other = student.to(getattr(torch, dtypes[0])), teacher.to(getattr(torch, dtypes[-1]))
    found = vocab_parallel_kl_terms(low, other)
    expected = dense_kl_terms(low.double(), other.double())
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)


def test_leading_dims_are_kept_and_zero_tokens_are_fine():
    terms = vocab_parallel_kl_terms(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    assert terms.reverse_kl.shape == (2, 3)
    empty = torch.randn(0, 8).requires_grad_()
    terms = vocab_parallel_kl_terms(empty, torch.randn(0, 8))
    terms.reverse_kl.sum().backward()
    assert terms.reverse_kl.shape == (0,) and empty.grad.shape == (0, 8)


def test_logits_may_be_views_of_something_wider():
    """Rows that are not next to each other, and columns that are not."""
    student, teacher = case_logits("flat", 4, 300)
    wide = torch.zeros(4, 400)
    wide[:, :300] = student
    expected = dense_kl_terms(student, teacher)
    for view in (wide[:, :300], student.T.contiguous().T):
        leaf = view.detach().requires_grad_()
        found = vocab_parallel_kl_terms(leaf, teacher)
        found.reverse_kl.sum().backward()
        torch.testing.assert_close(found.reverse_kl, expected.reverse_kl)
        reference = student.clone().requires_grad_()
        dense_kl_terms(reference, teacher).reverse_kl.sum().backward()
        torch.testing.assert_close(leaf.grad, reference.grad, rtol=1e-4, atol=1e-7)


def test_teacher_padded_wider_than_student_on_one_rank():
    """Unequal padding is fine while the real columns are the same tokens."""
    student, teacher = torch.randn(3, 8), torch.randn(3, 8)
    wide = torch.nn.functional.pad(teacher, (0, 4), value=50.0)
    found = vocab_parallel_kl_terms(student, wide, vocab_size=8)
    torch.testing.assert_close(found.reverse_kl, dense_kl_terms(student, teacher).reverse_kl)


def check_two_widths(columns: dict[str, int], num_tokens: int):
    """Each model with its own columns, padded as Megatron pads; the tokens are 151,665."""
    tp, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(4, num_tokens, generator=generator) for _ in columns)
    weights = torch.randn(2, 4, generator=generator)
    expected, expected_grad = dense_gradient(student, teacher, weights)
    # With one rank the widths stay apart; several ranks pad both to the same.
    widths = {who: pad_vocab_size(count, 128, tp) // tp for who, count in columns.items()}
    assert (len(set(widths.values())) == 1) == (tp > 1)
    shard = cut(student, widths["student"], rank).requires_grad_()
    found = vocab_parallel_kl_terms(
        shard,
        cut(teacher, widths["teacher"], rank),
        tp_group=dist.group.WORLD,
        vocab_size=num_tokens,
        **TEMPERATURES,
    )
    (weights[0] * found.reverse_kl + weights[1] * found.forward_kl).sum().backward()
    for value, reference in zip(found, expected, strict=True):
        assert ((value - reference).abs() / reference.abs().clamp(min=1)).max() < 1e-5
    assert relative_error(join(shard.grad, num_tokens), expected_grad) < 1e-5


@pytest.mark.parametrize("narrower", ["student", "teacher"])
@pytest.mark.parametrize("tp", [1, 2])
def test_widths_of_qwen25_match_dense_float64_over_its_tokens(tp, narrower, tmp_path):
    """151,936 columns up to 3B, 152,064 from 7B on, one tokenizer of 151,665 tokens."""
    columns = {"student": 152_064, "teacher": 152_064} | {narrower: 151_936}
    run_ranks(tp, tmp_path, check_two_widths, columns, 151_665)


def test_a_token_that_only_the_student_can_write_makes_reverse_kl_infinite():
    student, teacher = torch.zeros(2, 8), torch.zeros(2, 8)
    teacher[0, 3] = -torch.inf
    terms = vocab_parallel_kl_terms(student, teacher)
    assert terms.reverse_kl.tolist() == [torch.inf, 0.0]
    assert terms.forward_kl.isfinite().all()
    terms = vocab_parallel_kl_terms(teacher, student)
    assert terms.forward_kl.tolist() == [torch.inf, 0.0]


def test_bad_shapes_and_types_are_refused():
    with pytest.raises(ValueError, match="different tokens"):
        vocab_parallel_kl_terms(torch.randn(3, 8), torch.randn(4, 8))
    with pytest.raises(ValueError, match="Pad both vocabularies"):
        vocab_parallel_kl_terms(torch.randn(3, 8), torch.randn(3, 9))
    with pytest.raises(ValueError, match="must be floats"):
        vocab_parallel_kl_terms(torch.ones(3, 8).long(), torch.randn(3, 8))
    with pytest.raises(ValueError, match="temperatures must be > 0"):
        vocab_parallel_kl_terms(torch.randn(3, 8), torch.randn(3, 8), student_temperature=0)
    with pytest.raises(ValueError, match=r"mask \(2,\) must have one entry per token \(3,\)"):
        vocab_parallel_kl_terms(torch.randn(3, 8), torch.randn(3, 8), mask=torch.ones(2).bool())


def check_non_finite():
    fastest = kernels.kernels_for
    for use_eager in (False, True):
        kernels.kernels_for = (lambda *_: eager) if use_eager else fastest
        for value in (torch.nan, torch.inf):
            student, teacher = torch.randn(4, 300), torch.randn(4, 300)
            if dist.get_rank() == 1:
                student[0, 7] = student[2, 0] = value
                teacher[2, 299] = value
            with pytest.raises(
                NonFiniteLogitsError,
                match=r"student logits of 2 token\(s\) on tensor-parallel rank 1; "
                r"teacher logits of 1 token\(s\) on tensor-parallel rank 1",
            ):
                vocab_parallel_kl_terms(student, teacher, tp_group=dist.group.WORLD)
        nothing = torch.full((1, 8), -torch.inf)
        with pytest.raises(NonFiniteLogitsError, match="student logits of 1 token"):
            vocab_parallel_kl_terms(nothing, torch.randn(1, 8), tp_group=dist.group.WORLD)


def test_non_finite_logits_are_named_by_count_and_rank_on_every_rank(tmp_path):
    """NaN and +inf on one rank only, and a token whose every logit is −inf."""
    run_ranks(2, tmp_path, check_non_finite)


def test_reading_logits_after_an_inplace_backward_is_refused():
    """Autograd notices that somebody else still needed the logits."""
    leaf = torch.randn(2, 8).requires_grad_()
    logits = leaf * 1.0
    other = logits.square().sum()
    terms = vocab_parallel_kl_terms(logits, torch.randn(2, 8), inplace_backward=True)
    terms.reverse_kl.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
