"""A teacher's top k in place of its logits, against dense float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses import dense_kl_terms
from megatron_eopd.losses.estimators import TokenSignals
from megatron_eopd.losses.kernels import LOWEST
from megatron_eopd.losses.objective import Coefficients, token_objective
from megatron_eopd.losses.overlap import top_k_overlap
from megatron_eopd.losses.teacher_top_k import top_k_of_teacher, top_k_terms
from megatron_eopd.losses.vocab_parallel import describe_non_finite
from megatron_eopd.records import TeacherTopK
from tests.dense_objective import dense_token_loss

# Shapes: N tokens, V vocabulary with padding, W without, K top-k.
N, W, K, PADDING = 12, 61, 6, 3
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.7, 1.3

NORMALIZATIONS = ["teacher", "student", "both", "neither", "tail"]


def objectives() -> list[ObjectiveConfig]:
    """Everything that the top k is enough for: all estimators, gates and combinations of them."""
    common = {"entropy_threshold": 2.0, "top_k": K}
    options = [
        {"name": "eopd", "reverse_kl": "topk", "forward_kl": "topk", "gate": "always"}
        | {"top_k_normalization": normalization}
        for normalization in NORMALIZATIONS
    ]
    options += [
        {"name": "eopd_paper"},
        {"name": "opd_sampled"},
        {"name": "eopd_mix", "reverse_kl": "topk", "forward_kl": "topk", "gate_width": 0.5},
        {"name": "eopd_paper", "gate": "student", "entropy_threshold": 3.25},
        {"name": "eopd_paper", "gate": "disagreement", "gate_max_overlap": 1 / 6},
        {"name": "eopd_paper", "reverse_kl_clip": 1.2, "forward_kl_clip": 3.1},
    ]
    return [ObjectiveConfig.model_validate(common | own) for own in options]


def case(num_tokens: int = N, num_columns: int = W, dtype: torch.dtype = torch.float32):
    """(student, teacher, sampled ids, q_old): entropies on both sides of τ, ratios that are
    clipped, sampled tokens inside and outside the top k."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(num_tokens, num_columns, generator=generator) for _ in range(2))
    teacher = teacher * torch.linspace(0.5, 4, num_tokens).unsqueeze(-1)
    student, teacher = student.to(dtype), teacher.to(dtype)
    ids = torch.randint(num_columns, (num_tokens,), generator=generator)
    ids[::3] = teacher.argmax(-1)[::3]
    log_q = (student.float() / STUDENT_TEMPERATURE).log_softmax(-1)[torch.arange(num_tokens), ids]
    return student, teacher, ids, log_q + 0.3 * torch.randn(num_tokens, generator=generator)


def pad(logits: torch.Tensor) -> torch.Tensor:
    """Columns past the vocabulary are garbage on purpose, larger than any logit."""
    return torch.nn.functional.pad(logits, (0, PADDING), value=1e4)


def payload(teacher: torch.Tensor, ids: torch.Tensor, *, top_k: int = K, **options) -> TeacherTopK:
    options = {"tp_group": None, "temperature": TEACHER_TEMPERATURE} | options
    return top_k_of_teacher(teacher, ids, top_k=top_k, **({"vocab_size": W} | options))


def terms_of(student: torch.Tensor, teacher: TeacherTopK, ids: torch.Tensor, **options):
    options = {"tp_group": None, "student_temperature": STUDENT_TEMPERATURE} | options
    return top_k_terms(student, teacher, sampled_ids=ids, **({"vocab_size": W} | options))


def losses(terms, student: torch.Tensor, rollout_logprobs, objective: ObjectiveConfig):
    """(loss_N, gate_N) at α = 0.7, as the trainer makes them."""

    def overlap():
        return top_k_overlap(terms.picked, student, K, terms.vocabulary)

    signals = TokenSignals(terms.kl, terms.picked, rollout_logprobs, None, overlap)
    return token_objective(signals, objective, Coefficients(0.7, objective.entropy_threshold))[:2]


def dense_losses(student, teacher, ids, rollout_logprobs, objective, weights):
    """(loss_N, gate_N, gradient of weights · loss), float64."""
    dense = student.double().requires_grad_()
    loss, gate = dense_token_loss(
        dense,
        teacher.double(),
        ids,
        rollout_logprobs.double(),
        torch.zeros(len(ids)),
        objective,
        alpha=0.7,
        tau=objective.entropy_threshold,
        student_temperature=STUDENT_TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
    )
    (weights * loss).sum().backward()
    return loss.detach(), gate, dense.grad


def dense_log_p(teacher: torch.Tensor) -> torch.Tensor:
    return (teacher.double() / TEACHER_TEMPERATURE).log_softmax(-1)


def assert_payload_is_exact(found: TeacherTopK, teacher: torch.Tensor, ids: torch.Tensor):
    log_p = dense_log_p(teacher)
    order = teacher.sort(dim=-1, descending=True, stable=True).indices
    top, rest = order[:, :K], order[:, K:]
    assert torch.equal(found.ids_NK, top)
    expected = TeacherTopK(
        top,
        log_p.gather(-1, top),
        -(log_p.exp() * log_p).sum(-1),
        log_p.gather(-1, rest).logsumexp(-1),
        log_p[torch.arange(len(ids)), ids],
    )
    for name, value, reference in zip(found._fields[1:], found[1:], expected[1:], strict=True):
        assert value.dtype == torch.float32 and not value.requires_grad
        assert ((value - reference).abs() / reference.abs().clamp(min=1)).max() < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_payload_is_exact_over_the_full_vocabulary(dtype):
    """Ids (ties by id), log-probabilities, entropy, and the tail, also where it is 1e-30."""
    _, teacher, ids, _ = case(dtype=dtype)
    teacher[-1, 5] += 90
    teacher[-2, :K] += 60
    found = payload(pad(teacher).requires_grad_(), ids)
    assert_payload_is_exact(found, teacher, ids)
    assert found.tail_logmass_N.min() < -40


def test_wide_rows_are_worked_on_in_chunks():
    """More rows than fit into one chunk."""
    _, teacher, ids, _ = case(40, 60_000)
    found = payload(teacher, ids, vocab_size=60_000)
    assert_payload_is_exact(found, teacher, ids)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "objective", objectives(), ids=lambda o: f"{o.name}-{o.top_k_normalization}"
)
def test_objectives_match_dense_float64(objective, inplace):
    """Values, gates and gradients, with a weight of its own for each token."""
    student, teacher, ids, rollout_logprobs = case()
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1))
    expected = dense_losses(student, teacher, ids, rollout_logprobs, objective, weights)
    leaf = pad(student).requires_grad_()
    terms = terms_of(leaf, payload(pad(teacher), ids), ids, inplace_backward=inplace)
    loss, gate = losses(terms, leaf, rollout_logprobs, objective)
    (weights * loss).sum().backward()
    assert ((loss - expected[0]).abs() / expected[0].abs().clamp(min=1)).max() < 1e-5
    assert (gate - expected[1]).abs().max() < 1e-5
    assert (leaf.grad[:, :W] - expected[2]).abs().max() < 2e-5 * expected[2].abs().max()
    assert (leaf.grad[:, W:] == 0).all()
    assert (leaf.grad.data_ptr() == leaf.data_ptr()) == inplace


def test_entropies_are_exact_and_divergences_are_lower_bounds():
    student, teacher, ids, _ = case()
    expected = dense_kl_terms(
        student.double(),
        teacher.double(),
        student_temperature=STUDENT_TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
    )
    log_p = dense_log_p(teacher)
    log_q = (student.double() / STUDENT_TEMPERATURE).log_softmax(-1)
    top = log_p.topk(K).indices
    p, q = (
        torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], dim=-1)
        for inside in (log_p.exp().gather(-1, top), log_q.exp().gather(-1, top))
    )
    buckets = expected._replace(
        reverse_kl=(q * (q / p).log()).sum(-1), forward_kl=(p * (p / q).log()).sum(-1)
    )
    found = terms_of(student.requires_grad_(), payload(teacher, ids), ids).kl
    for value, reference in zip(found, buckets, strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)
    assert (found.reverse_kl < expected.reverse_kl).all()
    assert (found.forward_kl < expected.forward_kl).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_k_of_the_whole_vocabulary_is_full_kl(normalization):
    """Of the loss and of the metrics; nothing is left outside, and no NaN comes of that."""
    student, teacher, ids, rollout_logprobs = case()
    full = ObjectiveConfig(name="eopd", gate="always")
    expected = dense_losses(student, teacher, ids, rollout_logprobs, full, torch.ones(N))
    leaf = pad(student).requires_grad_()
    teacher_top_k = payload(pad(teacher), ids, top_k=W + 5)
    assert teacher_top_k.ids_NK.shape == (N, W)
    assert (teacher_top_k.tail_logmass_N == LOWEST).all()
    terms = terms_of(leaf, teacher_top_k, ids)
    objective = ObjectiveConfig(
        name="eopd",
        reverse_kl="topk",
        forward_kl="topk",
        gate="always",
        top_k=W,
        top_k_normalization=normalization,
    )
    loss, _ = losses(terms, leaf, rollout_logprobs, objective)
    loss.sum().backward()
    # A tail of 1e-6 that the estimator always leaves costs that much.
    torch.testing.assert_close(loss.double(), expected[0], rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(leaf.grad[:, :W].double(), expected[2], rtol=3e-5, atol=3e-5)
    of_metrics = terms.kl.reverse_kl + 0.7 * terms.kl.forward_kl
    torch.testing.assert_close(of_metrics.double(), expected[0], rtol=3e-5, atol=3e-5)


def test_a_teacher_that_can_write_fewer_than_k_tokens():
    """The rest of its columns is marked invalid and adds nothing, to token 0 least of all."""
    student, teacher, ids, rollout_logprobs = case()
    teacher[:, :20] = teacher[:, 23:] = -torch.inf
    ids = 20 + ids % 3
    found = payload(teacher, ids)
    assert torch.equal(found.valid_NK, (torch.arange(K) < 3).expand(N, K))
    assert (found.ids_NK[:, 3:] == 0).all() and (found.logprobs_NK[:, 3:] == LOWEST).all()
    assert (found.tail_logmass_N == LOWEST).all()
    for normalization in NORMALIZATIONS[:4]:
        objective = ObjectiveConfig(
            name="fkl", forward_kl="topk", top_k=3, top_k_normalization=normalization
        )
        expected = dense_losses(student, teacher, ids, rollout_logprobs, objective, torch.ones(N))
        leaf = student.clone().requires_grad_()
        terms = terms_of(leaf, found, ids)
        loss, _ = losses(terms, leaf, rollout_logprobs, objective)
        loss.sum().backward()
        torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaf.grad.double(), expected[2], rtol=1e-5, atol=1e-5)
        assert all(value.isfinite().all() for value in terms.kl)


def test_a_token_that_is_picked_twice_gets_both_gradients():
    student, teacher, _, _ = case()
    ids = teacher.argmax(-1)
    leaf, dense = student.requires_grad_(), student.detach().double().requires_grad_()
    picked = terms_of(leaf, payload(teacher, ids), ids).picked
    (3 * picked.sampled_student_logprobs + picked.top_student_logprobs.sum(-1)).sum().backward()
    log_q = (dense / STUDENT_TEMPERATURE).log_softmax(-1)
    top = teacher.topk(K).indices
    (3 * log_q[torch.arange(N), ids] + log_q.gather(-1, top).sum(-1)).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), dense.grad, rtol=1e-5, atol=1e-5)


def test_bfloat16_gradient_is_one_rounding_from_float64():
    student, teacher, ids, rollout_logprobs = case(dtype=torch.bfloat16)
    objective = objectives()[0]
    expected = dense_losses(student, teacher, ids, rollout_logprobs, objective, torch.ones(N))
    leaf = student.clone().requires_grad_()
    terms = terms_of(leaf, payload(teacher, ids), ids)
    loss, _ = losses(terms, leaf, rollout_logprobs, objective)
    loss.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
    # rtol: half a unit in bf16's last place, and float32's rounding before it, which atol bounds.
    torch.testing.assert_close(leaf.grad.double(), expected[2], rtol=2**-8 * 1.01, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_no_float32_copy_of_bfloat16_logits_is_made():
    student, teacher, ids, _ = case(240, 30_000, torch.bfloat16)
    student.requires_grad_()
    with LargestTensor() as largest:
        found = payload(teacher, ids, vocab_size=30_000)
        picked = terms_of(student, found, ids, vocab_size=30_000).picked
        (picked.sampled_student_logprobs.sum() + picked.top_student_logprobs.sum()).backward()
    assert 0 < largest.num_elements < student.numel()


def test_zero_tokens_are_fine():
    student, teacher, ids, rollout_logprobs = (x[:0] for x in case())
    student = student.clone().requires_grad_()
    found = payload(teacher, ids)
    assert found.ids_NK.shape == (0, K)
    terms = terms_of(student, found, ids)
    gated = ObjectiveConfig(name="eopd_paper", top_k=K, gate="disagreement")
    losses(terms, student, rollout_logprobs, gated)[0].sum().backward()
    assert student.grad.shape == (0, W) and terms.non_finite_R2.tolist() == [[0, 0]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_logits_are_counted_by_model(value):
    """The teacher's travel in what it hands over, also logits of nothing but −inf; other tokens'
    terms stay as they are."""
    student, teacher, ids, _ = case()
    clean = terms_of(student, payload(teacher, ids), ids)
    assert describe_non_finite(clean.non_finite_R2) == ""
    bad_student, bad_teacher = student.clone(), teacher.clone()
    bad_student[0, 7] = bad_student[2, 0] = bad_teacher[2, 40] = value
    bad_student[5] = bad_teacher[4] = bad_teacher[6] = -torch.inf
    terms = terms_of(bad_student, payload(bad_teacher, ids), ids)
    assert terms.non_finite_R2.tolist() == [[3, 3]]
    good = [n for n in range(N) if n not in (0, 2, 4, 5, 6)]
    for found, expected in zip(terms.kl, clean.kl, strict=True):
        assert torch.equal(found[good], expected[good])


def test_bad_arguments_are_refused():
    student, teacher, ids, _ = case()
    with pytest.raises(ValueError, match="not top_k=0"):
        payload(teacher, ids, top_k=0)
    with pytest.raises(ValueError, match="temperatures must be > 0"):
        payload(teacher, ids, temperature=0.0)
    with pytest.raises(ValueError, match="student logits of 11 tokens, a teacher's top k of 12"):
        terms_of(student[1:], payload(teacher, ids), ids)
