"""Single tokens from the sweep, and other divergences, against dense float64."""

import pytest
import torch
import torch.distributed as dist

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses.estimators import TokenSignals
from megatron_eopd.losses.kernels import LOWEST
from megatron_eopd.losses.objective import Coefficients, token_objective, token_weights
from megatron_eopd.losses.overlap import top_k_overlap
from megatron_eopd.losses.top_k import top_k_of_rows
from megatron_eopd.losses.vocab_parallel import vocab_parallel_terms
from megatron_eopd.losses.vocab_sum import sum_over_vocab
from megatron_eopd.objectives import PRESETS
from tests.dense_objective import dense_overlap, dense_token_loss
from tests.distributed.test_losses import TEMPERATURES, case_logits, cut, join, relative_error
from tests.ranks import run_ranks

# Shapes: N tokens, W whole vocabulary, K top-k.


def top_ids(logits: torch.Tensor, k: int) -> list[list[int]]:
    """By (logit, lower id), the slow way."""
    rows = logits.double().tolist()
    return [sorted(range(len(row)), key=lambda v: (-row[v], v))[:k] for row in rows]


def check_picked(N: int, W: int, k: int, dtype: torch.dtype, support: str):
    tp, rank = dist.get_world_size(), dist.get_rank()
    width = -(-W // tp) + 3
    student, teacher = case_logits("flat", N, W)
    # Alike enough for tokens that are in the top k of both.
    student, teacher = student.to(dtype), (student + teacher).to(dtype)
    ids = torch.randint(W, (N,), generator=torch.Generator().manual_seed(2))
    shard = cut(student, width, rank).requires_grad_()
    terms = vocab_parallel_terms(
        shard,
        cut(teacher, width, rank),
        tp_group=dist.group.WORLD,
        vocab_size=W,
        sampled_ids=ids,
        top_k=k,
        top_k_of=support,
        **TEMPERATURES,
    )
    picked = terms.picked
    expected_ids = []
    for p_ids, q_ids in zip(top_ids(teacher, k), top_ids(student, k), strict=True):
        rest = [i for i in q_ids if i not in p_ids]
        expected_ids.append({"teacher": p_ids, "student": q_ids, "union": p_ids + rest}[support])
    found = [i[v].tolist() for i, v in zip(picked.top_ids, picked.top_valid, strict=True)]
    assert found == expected_ids

    dense = student.double().requires_grad_()
    log_q = (dense / TEMPERATURES["student_temperature"]).log_softmax(-1)
    log_p = (teacher.double() / TEMPERATURES["teacher_temperature"]).log_softmax(-1)
    unlisted = cut(teacher, width, rank) if support == "student" else shard
    overlap = top_k_overlap(picked, unlisted, min(k, W), terms.vocabulary)
    for value, reference in zip(overlap, dense_overlap(log_q.detach(), log_p, k), strict=True):
        assert not value.requires_grad and (value - reference).abs().max() < 1e-6
    rows = torch.arange(N)
    assert (picked.sampled_student_logprobs - log_q[rows, ids]).abs().max() < 1e-5
    assert (picked.sampled_teacher_logprobs - log_p[rows, ids]).abs().max() < 1e-5
    # Some loss of them all, with a weight of its own for each.
    loss, reference = picked.sampled_student_logprobs.sum(), log_q[rows, ids].sum()
    for n in range(N):
        valid = picked.top_valid[n]
        weights = torch.arange(1, valid.sum() + 1)
        loss = loss + (weights * picked.top_student_logprobs[n][valid].square()).sum()
        reference = reference + (weights * log_q[n, expected_ids[n]].square()).sum()
        teachers = picked.top_teacher_logprobs[n][valid]
        assert (teachers - log_p[n, expected_ids[n]]).abs().max() < 1e-5
    (loss + terms.kl.reverse_kl.sum()).backward()
    (reference + (log_q.exp() * (log_q - log_p)).sum()).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert relative_error(join(shard.grad, W), dense.grad) < tolerance


def check_missing_tokens():
    """The first ranks have no token that the student can write, and one of the teacher's best."""
    width, rank = -(-40 // dist.get_world_size()), dist.get_rank()
    student, teacher = torch.full((1, 40), -torch.inf), torch.zeros(1, 40)
    student[0, 38:] = 0.0
    teacher[0, [0, 38, 7, 12]] = torch.tensor([5.0, 4.0, 3.0, 2.0])
    shards = cut(student, width, rank), cut(teacher, width, rank)
    terms = vocab_parallel_terms(*shards, tp_group=dist.group.WORLD, vocab_size=40, top_k=4)
    assert top_k_overlap(terms.picked, shards[0], 4, terms.vocabulary).share == 1 / 4


def check_all_picked():
    check_missing_tokens()
    for dtype in (torch.float32, torch.bfloat16):
        for support in ("teacher", "student", "union"):
            check_picked(4, 37, 5, dtype, support)
            check_picked(2, 2000, 16, dtype, support)  # bfloat16: full of ties
    check_picked(3, 5, 9, torch.float32, "union")  # k > V


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_sampled_and_top_k_tokens_match_dense_float64(tp, tmp_path):
    """Ids, log-probabilities, gradients and what both top ks share, wherever the tokens' columns
    are; duplicates (the sampled token in the top k, a token in both top ks) add up; equal logits go
    by their id."""
    run_ranks(tp, tmp_path, check_all_picked)


def test_top_k_equals_sorting_whatever_the_ties():
    for width in (3, 300, 9000):
        values = torch.randint(-3, 3, (4, width)).bfloat16()
        values[:, ::5] = -torch.inf
        found, columns = top_k_of_rows(values, 7)
        for n, expected in enumerate(top_ids(values, 7)):
            finite = [v for v in expected if values[n, v] > -torch.inf]
            assert columns[n, : len(finite)].tolist() == finite
            assert (found[n, len(finite) :] == LOWEST).all()


def test_a_sampled_id_that_is_no_token_has_no_probability():
    logits = torch.randn(2, 8)
    terms = vocab_parallel_terms(logits, logits, vocab_size=6, sampled_ids=torch.tensor([7, 2]))
    assert terms.picked.sampled_student_logprobs[0] < -1e29
    assert terms.picked.sampled_student_logprobs[1].isfinite()


def options_to_check() -> list[ObjectiveConfig]:
    common = {"entropy_threshold": 2.0, "top_k": 6, "jsd_beta": 0.3}
    width = {"eopd_mix": {"gate_width": 0.5}}
    presets = [common | {"name": name} | width.get(name, {}) for name in PRESETS]
    top_k = [
        common
        | {"name": "eopd", "reverse_kl": "topk", "forward_kl": "topk", "gate": "always"}
        | {"top_k_support": support, "top_k_normalization": normalization}
        for support in ("teacher", "student", "union")
        for normalization in ("teacher", "student", "both", "neither", "tail")
    ]
    more = [
        common | {"name": "jsd", "gate": "hard", "reverse_kl": "skewed", "skew": 0.4},
        common | {"name": "eopd", "token_weight": "position", "ignored_token_ids": (1, 5)},
        common | {"name": "eopd", "token_weight": "early", "early_token_gain": 2.0},
        common | {"name": "eopd", "entropy_weight": "confidence", "entropy_weight_scale": 2.0},
        common | {"name": "opd_sampled", "token_weight": "early", "entropy_weight": "confidence"},
        common | {"name": "eopd", "gate": "student", "entropy_threshold": 3.25},
        common | {"name": "eopd", "reverse_kl_clip": 1.5, "forward_kl_clip": 2.0},
        common | {"name": "eopd_paper", "reverse_kl_clip": 1.2, "forward_kl_clip": 3.9},
        common | {"name": "jsd", "forward_kl_clip": 0.3},
    ]
    # As many shared tokens as some rows have.
    disagreement = {"gate": "disagreement", "gate_max_overlap": 1 / 6}
    more += [
        common | disagreement | {"name": name, "top_k_support": support}
        for name in ("eopd", "eopd_paper")
        for support in ("teacher", "student", "union")
    ]
    return [ObjectiveConfig.model_validate(options) for options in presets + top_k + more]


def check_objectives(N: int, W: int):
    tp, rank = dist.get_world_size(), dist.get_rank()
    width = -(-W // tp) + 3
    generator = torch.Generator().manual_seed(5)
    student, teacher = case_logits("flat", N, W)
    teacher = teacher * torch.linspace(0.5, 4, N).unsqueeze(-1)  # entropies on both sides of τ
    ids = torch.randint(W, (N,), generator=generator)
    log_q = (student / TEMPERATURES["student_temperature"]).log_softmax(-1)[torch.arange(N), ids]
    rollout_logprobs = log_q + 0.3 * torch.randn(N, generator=generator)  # some ratios are clipped
    positions = torch.linspace(0, 1, N)
    weights = torch.randn(N, generator=generator)
    for objective in options_to_check():
        alpha = 0.7 if objective.formula.combine == "interpolate" else 1.3
        dense = student.double().requires_grad_()
        expected, expected_gate = dense_token_loss(
            dense,
            teacher.double(),
            ids,
            rollout_logprobs.double(),
            positions,
            objective,
            alpha=alpha,
            tau=objective.entropy_threshold,
            **TEMPERATURES,
        )
        (weights * expected).sum().backward()

        shard = cut(student, width, rank).requires_grad_()
        teacher_shard = cut(teacher, width, rank)
        loss, gate, clipped = objective_on_shards(
            shard, teacher_shard, ids, rollout_logprobs, positions, objective, alpha, W
        )
        (weights * loss).sum().backward()
        assert ((loss - expected).abs() / expected.abs().clamp(min=1)).max() < 1e-5, objective
        assert (gate - expected_gate).abs().max() < 1e-4
        # A gate or clip that is the same for all tokens would check little.
        assert objective.formula.gate in ("always", "never") or 0 < gate.sum() < N, objective
        assert all(0 < is_above.sum() < N for is_above in clipped.values()), objective
        assert relative_error(join(shard.grad, W), dense.grad) < 2e-5, objective


def objective_on_shards(student, teacher, ids, rollout_logprobs, positions, objective, alpha, W):
    terms = vocab_parallel_terms(
        student,
        teacher,
        tp_group=dist.group.WORLD,
        vocab_size=W,
        sampled_ids=ids,
        top_k=objective.top_k,
        top_k_of=objective.top_k_support,
        **TEMPERATURES,
    )
    signals = TokenSignals(
        terms.kl,
        terms.picked,
        rollout_logprobs,
        lambda integrand: sum_over_vocab(integrand, student, teacher, terms),
        lambda: top_k_overlap(
            terms.picked,
            teacher if objective.top_k_support == "student" else student,
            objective.top_k,
            terms.vocabulary,
        ),
    )
    coefficients = Coefficients(alpha, objective.entropy_threshold)
    weights = token_weights(positions, ids, terms.kl.teacher_entropy, objective)
    return token_objective(signals, objective, coefficients, weights)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_objective_matches_dense_float64(tp, tmp_path):
    """All presets, all top-k policies, mixtures, gates, clips and weights: values and
    gradients."""
    run_ranks(tp, tmp_path, check_objectives, 8, 61)


def check_new_divergence():
    """A Rényi-like integrand that no preset has."""
    rank = dist.get_rank()
    student, teacher = case_logits("forbidden", 3, 50)

    def integrand(log_q, log_p):
        return torch.exp(0.5 * log_p + 0.5 * log_q)

    shard, teacher_shard = cut(student, 28, rank).requires_grad_(), cut(teacher, 28, rank)
    terms = vocab_parallel_terms(
        shard, teacher_shard, tp_group=dist.group.WORLD, vocab_size=50, **TEMPERATURES
    )
    found = sum_over_vocab(integrand, shard, teacher_shard, terms)
    found.square().sum().backward()
    dense = student.double().requires_grad_()
    log_q = (dense / TEMPERATURES["student_temperature"]).log_softmax(-1)
    log_p = (teacher.double() / TEMPERATURES["teacher_temperature"]).log_softmax(-1)
    finite = log_q > -torch.inf
    expected = torch.exp(0.5 * log_p + 0.5 * log_q).where(finite, 0.0).sum(-1)
    expected.square().sum().backward()
    assert (found - expected).abs().max() < 1e-5
    assert relative_error(join(shard.grad, 50), dense.grad.nan_to_num()) < 1e-5


def test_a_new_divergence_is_its_formula_and_nothing_else(tmp_path):
    """sum_over_vocab takes any pointwise formula, with logits of −inf, over tensor parallelism."""
    run_ranks(2, tmp_path, check_new_divergence)
