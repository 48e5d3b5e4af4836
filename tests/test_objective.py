"""The objective's identities, schedules, gates and weights; and what a faulty construction does."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_eopd.config import ObjectiveConfig, load_config
from megatron_eopd.errors import ConfigError
from megatron_eopd.losses import (
    dense_kl_terms,
    estimators,
    vocab_parallel_kl_terms,
    vocab_parallel_terms,
)
from megatron_eopd.losses.estimators import TokenSignals
from megatron_eopd.losses.objective import (
    Coefficients,
    coefficients_at,
    token_objective,
    token_weights,
)
from megatron_eopd.losses.overlap import top_k_overlap
from megatron_eopd.losses.vocab_sum import sum_over_vocab
from megatron_eopd.objectives import FORWARD_KL, GATES, PRESETS, REVERSE_KL
from megatron_eopd.schedules import START, Progress
from tests.dense_objective import dense_overlap

# Shapes: N tokens, V vocabulary.
N, V = 64, 40


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(N, V, generator=generator)
    teacher = torch.randn(N, V, generator=generator) * torch.linspace(0.5, 5, N).unsqueeze(-1)
    return student.requires_grad_(), teacher


IDS = torch.arange(N) % V


def signals_of(logits, objective, rollout_logprobs=None) -> TokenSignals:
    student, teacher = logits
    terms = vocab_parallel_terms(
        student,
        teacher,
        sampled_ids=IDS[: len(student)],
        top_k=objective.top_k,
        top_k_of=objective.top_k_support,
    )
    if rollout_logprobs is None:
        rollout_logprobs = terms.picked.sampled_student_logprobs.detach()
    unlisted = teacher if objective.top_k_support == "student" else student
    return TokenSignals(
        terms.kl,
        terms.picked,
        rollout_logprobs,
        lambda h: sum_over_vocab(h, *logits, terms),
        lambda: top_k_overlap(terms.picked, unlisted, min(objective.top_k, V), terms.vocabulary),
    )


def evaluate(logits, *, rollout_logprobs=None, weight=None, alpha=None, tau=None, **options):
    """(loss_N, gate_N, gradient) of an objective on whole logits."""
    objective = ObjectiveConfig.model_validate({"entropy_threshold": 2.0} | options)
    signals = signals_of(logits, objective, rollout_logprobs)
    coefficients = coefficients_at(objective, START)
    if tau is not None:
        coefficients = Coefficients(coefficients.forward_kl_weight, tau)
    loss, gate, _ = token_objective(signals, objective, coefficients, weight)
    (gradient,) = torch.autograd.grad(loss.sum(), logits[0])
    return loss.detach(), gate, gradient


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a[2], b[2], rtol=tolerance, atol=tolerance)


def test_rows_name_functions_and_presets_name_rows():
    rows = [*REVERSE_KL.values(), *FORWARD_KL.values(), *GATES.values()]
    assert all(callable(getattr(estimators, row.function)) for row in rows if row is not None)
    for formula in PRESETS.values():
        assert formula.reverse_kl in REVERSE_KL and formula.forward_kl in FORWARD_KL
        assert formula.gate in GATES and formula.combine in ("add", "interpolate")


@pytest.mark.parametrize("table", [REVERSE_KL, FORWARD_KL], ids=["reverse", "forward"])
def test_what_a_row_says_it_needs_is_what_its_function_uses(table, logits):
    """Found by taking each thing away: without the second sweep, the log-probabilities of the
    engine, or the exact divergences, just those functions fail that say they need them."""
    objective = ObjectiveConfig()
    signals = signals_of(logits, objective)
    for row in filter(None, table.values()):
        function = getattr(estimators, row.function)
        for field, needed in (
            ("sum_over_vocab", row.needs_second_sweep),
            ("rollout_logprobs_N", row.needs_sampled_tokens),
            ("kl", row.needs_whole_distribution and not row.needs_second_sweep),
        ):
            without = replace(signals, **{field: None})
            if needed:
                with pytest.raises((TypeError, AttributeError)):
                    function(without, objective)
            else:
                function(without, objective)


# Identities of the method.


def test_eopd_without_a_threshold_is_opd(logits):
    """τ = ∞ never opens the gate."""
    never = evaluate(logits, name="eopd", tau=math.inf)
    opd = evaluate(logits, name="opd")
    assert torch.equal(never[0], opd[0]) and never[1].sum() == 0 and opd[1].sum() == 0


def test_eopd_below_every_entropy_adds_forward_kl_everywhere(logits):
    """τ = −1 opens it for every token: the two KLs are added, reverse KL stays."""
    both = evaluate(logits, name="eopd", tau=-1.0)
    terms = dense_kl_terms(*logits)
    torch.testing.assert_close(both[0], terms.reverse_kl + terms.forward_kl, rtol=1e-5, atol=1e-5)
    assert (both[1] == 1).all()
    fkl = evaluate(logits, name="fkl")
    torch.testing.assert_close(fkl[0], terms.forward_kl, rtol=1e-5, atol=1e-5)


def test_gradient_over_the_vocabulary_sums_to_0(logits):
    for name in PRESETS:
        gradient = evaluate(logits, name=name)[2]
        assert gradient.sum(-1).abs().max() < 1e-5 * gradient.abs().max().clamp(min=1), name


@pytest.mark.parametrize("normalization", ["teacher", "student", "both", "neither", "tail"])
def test_top_k_with_k_of_the_whole_vocabulary_is_full(logits, normalization):
    options = {"gate": "always", "top_k": V, "top_k_normalization": normalization}
    full = evaluate(logits, name="eopd", gate="always")
    cut = evaluate(logits, name="eopd", reverse_kl="topk", forward_kl="topk", **options)
    close(cut, full, tolerance=3e-5)


def test_eopd_mix_with_a_narrow_gate_switches_between_the_two_kls(logits):
    mix = evaluate(logits, name="eopd_mix", gate_width=1e-4)
    terms = dense_kl_terms(*logits)
    open_N = terms.teacher_entropy >= 2.0
    assert 0 < open_N.sum() < N
    expected = torch.where(open_N, terms.forward_kl, terms.reverse_kl)
    torch.testing.assert_close(mix[0], expected, rtol=1e-5, atol=1e-5)


def test_fixed_mix_at_its_ends_is_one_of_the_two(logits):
    close(evaluate(logits, name="fixed_mix", forward_kl_weight=0.0), evaluate(logits, name="opd"))
    close(evaluate(logits, name="fixed_mix", forward_kl_weight=1.0), evaluate(logits, name="fkl"))


def test_jsd_and_skewed_kl_become_kl_at_their_ends(logits):
    """JSD/β → forward KL as β → 0, JSD/(1 − β) → reverse KL as β → 1; skewed KL likewise."""
    logits = tuple(x[:16].detach() for x in logits)  # mild: q/p beyond 1/β would bend the limit
    logits[0].requires_grad_()
    terms = dense_kl_terms(*(x.double() for x in logits))
    forward = evaluate(logits, name="jsd", jsd_beta=1e-3)[0] / 1e-3
    reverse = evaluate(logits, name="jsd", jsd_beta=1 - 1e-3)[0] / 1e-3
    torch.testing.assert_close(forward.double(), terms.forward_kl, rtol=0.05, atol=0.02)
    torch.testing.assert_close(reverse.double(), terms.reverse_kl, rtol=0.05, atol=0.02)
    skewed = evaluate(logits, name="skewed_kl", skew=1e-4)[0]
    torch.testing.assert_close(skewed.double(), terms.forward_kl, rtol=1e-2, atol=1e-3)
    skewed = evaluate(logits, name="skewed_reverse_kl", skew=1e-4)[0]
    torch.testing.assert_close(skewed.double(), terms.reverse_kl, rtol=1e-2, atol=1e-3)


def test_sampled_gradient_has_the_mean_of_the_full_gradient_and_vopd_the_lower_variance():
    """Averaged over every token of the vocabulary with weight q, on the policy: exactly the
    gradient of reverse KL, with and without the control variate."""
    generator = torch.Generator().manual_seed(0)
    one_student = torch.randn(1, V, generator=generator)
    one_teacher = torch.randn(1, V, generator=generator)
    logits = (one_student.repeat(V, 1).requires_grad_(), one_teacher.repeat(V, 1))
    q = one_student.softmax(-1).squeeze(0)
    variances = {}
    ids = torch.arange(V)
    terms = vocab_parallel_terms(*logits, sampled_ids=ids)
    on_policy = terms.picked.sampled_student_logprobs.detach()
    full = vocab_parallel_kl_terms(*logits).reverse_kl.sum()
    (expected,) = torch.autograd.grad(full, logits[0])
    for name in ("sampled", "vopd"):
        objective = ObjectiveConfig(name="opd", reverse_kl=name)
        signals = TokenSignals(terms.kl, terms.picked, on_policy, lambda h: h, lambda: None)
        loss = getattr(estimators, REVERSE_KL[name].function)(signals, objective).sum()
        (gradient,) = torch.autograd.grad(loss, logits[0], retain_graph=True)
        mean = (q.unsqueeze(-1) * gradient).sum(0)
        torch.testing.assert_close(mean, expected[0], rtol=1e-4, atol=1e-6)
        variances[name] = (q.unsqueeze(-1) * (gradient - mean).square()).sum().item()
    assert variances["vopd"] < 0.9 * variances["sampled"]


def test_gate_follows_the_entropy_of_the_same_token(logits):
    """Token by token: the loss differs from reverse KL exactly where the teacher is unsure; shifted
    by one position the gate would open for other tokens."""
    loss, gate, _ = evaluate(logits, forward_kl_weight=0.5)
    terms = dense_kl_terms(*logits)
    unsure = terms.teacher_entropy >= 2.0
    assert torch.equal(gate.bool(), unsure)
    expected = terms.reverse_kl + 0.5 * unsure * terms.forward_kl
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    shifted = terms.reverse_kl + 0.5 * unsure.roll(1) * terms.forward_kl
    assert (loss - shifted).abs().max() > 0.1


# Schedules and weights.


def after(step: int, *, of: int) -> Progress:
    """Iterations of one optimizer step."""
    return Progress(step, step, of)


def test_schedules_move_alpha_and_tau_and_then_stay():
    objective = ObjectiveConfig(
        entropy_threshold=2.0,
        final_entropy_threshold=1.0,
        final_forward_kl_weight=0.0,
        schedule_steps=10,
    )
    at = [coefficients_at(objective, after(step, of=100)) for step in (0, 5, 10, 50)]
    assert [c.entropy_threshold for c in at] == [2.0, 1.5, 1.0, 1.0]
    assert [c.forward_kl_weight for c in at] == [1.0, 0.5, 0.0, 0.0]
    cosine = objective.model_copy(update={"schedule": "cosine", "schedule_steps": None})
    assert coefficients_at(cosine, after(25, of=100)).entropy_threshold == pytest.approx(1.853553)
    still = coefficients_at(ObjectiveConfig(name="fixed_mix"), after(7, of=10))
    assert still == Coefficients(0.5, 0.8)


def weights_of(**options) -> list[float] | None:
    position, ids = torch.tensor([0.0, 0.3, 1.0]), torch.tensor([5, 6, 7])
    entropy = torch.tensor([0.0, 2.0, 1e4])
    weights = token_weights(position, ids, entropy, ObjectiveConfig(**options))
    return None if weights is None else weights.tolist()


def test_token_weights():
    """The position weight is 0.25 + 0.75·σ((pos − 0.30) / 0.10), the early one 1 + γ·(1 − pos), a
    sure teacher's f + (1 − f)·exp(−H / scale); together they are multiplied, and ignored tokens
    weigh nothing."""
    assert weights_of() is None
    late = [0.25 + 0.75 / (1 + math.exp(3)), 0.625, 0.0]
    assert weights_of(token_weight="position", ignored_token_ids=(7,)) == pytest.approx(late)
    early = [1.4, 1.28, 1.0]
    assert weights_of(token_weight="early", early_token_gain=0.4) == pytest.approx(early)
    sure = {"entropy_weight": "confidence", "entropy_weight_floor": 0.1, "entropy_weight_scale": 2}
    confidence = [1.0, 0.1 + 0.9 / math.e, 0.1]
    assert weights_of(**sure) == pytest.approx(confidence)
    both = weights_of(token_weight="early", early_token_gain=0.4, **sure)
    assert both == pytest.approx([a * b for a, b in zip(early, confidence, strict=True)])


def test_gates_on_the_student_and_on_disagreement(logits):
    """They open by the student's own entropy, and where the top k share no more than a share of
    their tokens; whose top k the support has makes no difference."""
    student, teacher = (x.detach().double() for x in logits)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    tau = entropy.median().item() - 1e-4
    gate = evaluate(logits, gate="student", tau=tau)[1]
    assert torch.equal(gate.bool(), entropy >= tau) and 0.4 < gate.mean() < 0.6
    share = dense_overlap(log_q, log_p, 5)[0]
    for bound in (0.0, 0.2, 1.0):
        for support in ("teacher", "student", "union"):
            options = {"gate_max_overlap": bound, "top_k": 5, "top_k_support": support}
            gate = evaluate(logits, gate="disagreement", **options)[1]
            assert torch.equal(gate.bool(), share <= bound)
    # 1/5 in float32 is not 0.2: tokens on the bound are within it.
    assert (share == 0.2).any() and (share == 0).any() and (share > 0.2).any()


@pytest.mark.parametrize("support", ["teacher", "student"])
def test_a_model_that_can_write_fewer_than_k_tokens_shares_no_more(support, logits):
    """What is missing in a list is no token, of the listed model and of the other."""
    student, teacher = (x.detach().clone() for x in logits)
    student[:, :20] = teacher[:, :17] = teacher[:, 23:] = -torch.inf
    objective = ObjectiveConfig(top_k=8, top_k_support=support)
    overlap = signals_of((student, teacher), objective).overlap()
    best_q = student.topk(8).indices
    shared = [len({20, 21, 22} & set(row)) for row in best_q.tolist()]
    assert overlap.share.tolist() == [count / 8 for count in shared] and max(shared) > 1
    student[:, 22:] = -torch.inf
    overlap = signals_of((student, teacher), objective).overlap()
    assert (overlap.share == 2 / 8).all()
    p = teacher.softmax(-1)
    torch.testing.assert_close(overlap.teacher_mass, p[:, 20:22].sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(overlap.student_mass, torch.ones(N), rtol=1e-5, atol=1e-6)


def test_a_term_above_its_clip_is_constant(logits):
    """And has no gradient, in either KL; below the clip nothing changes."""
    options = {"gate": "always", "reverse_kl_clip": 3.0, "forward_kl_clip": 2.0}
    loss, _, gradient = evaluate(logits, **options)
    terms = dense_kl_terms(*(x.detach() for x in logits))
    over = terms.reverse_kl > 3.0, terms.forward_kl > 2.0
    assert all(0 < (over[0] & over[1]).sum() < each.sum() < N for each in over)
    expected = terms.reverse_kl.clamp(max=3.0) + terms.forward_kl.clamp(max=2.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(gradient.abs().amax(-1) == 0, over[0] & over[1])
    free = ~over[0] & ~over[1]
    whole = evaluate(logits, gate="always")
    assert torch.equal(gradient[free], whole[2][free])
    signals = signals_of(logits, objective := ObjectiveConfig(**options))
    clipped = token_objective(signals, objective, Coefficients(1.0, 0.8)).clipped
    assert list(clipped) == ["reverse_kl", "forward_kl"]
    assert all(torch.equal(a, b) for a, b in zip(clipped.values(), over, strict=True))


def test_a_clip_makes_an_infinite_divergence_finite(logits):
    """A token that the student alone can write."""
    student, teacher = logits[0].detach().requires_grad_(), logits[1].clone()
    teacher[3, 7] = -torch.inf
    loss, _, gradient = evaluate((student, teacher), name="opd", reverse_kl_clip=5.0)
    assert loss[3] == 5 and not gradient[3].any() and gradient.isfinite().all()


def test_a_clip_of_a_term_that_is_not_there_is_refused():
    for name, term in (("opd", "forward_kl"), ("fkl", "reverse_kl")):
        with pytest.raises(ValueError, match=f"{term}_clip=2 would be ignored with {term}=none"):
            ObjectiveConfig.model_validate({"name": name, f"{term}_clip": 2})


@pytest.mark.parametrize(
    ("option", "value", "switch", "on", "off"),
    [
        ("gate_width", 0.3, "gate", "sigmoid", "hard"),
        ("gate_quantile", 0.3, "gate", "quantile", "hard"),
        ("gate_max_overlap", 0.3, "gate", "disagreement", "hard"),
        ("early_token_gain", 2.0, "token_weight", "early", "uniform"),
        ("entropy_weight_floor", 0.5, "entropy_weight", "confidence", "uniform"),
        ("entropy_weight_scale", 2.0, "entropy_weight", "confidence", "uniform"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(option, value, switch, on, off):
    """Unless it has its default, as it has in the config.json of a run that left it out."""
    told = f"{option}={value:g} would be ignored with {switch}={off}.*set {switch}={on}"
    with pytest.raises(ValueError, match=told):
        ObjectiveConfig.model_validate({option: value})
    assert getattr(ObjectiveConfig.model_validate({option: value, switch: on}), option) == value
    every = ObjectiveConfig().model_dump()
    assert ObjectiveConfig.model_validate(every).model_dump() == every


def test_the_gate_of_a_preset_reads_its_options():
    """And of the option `gate`, where that takes the place of the preset's."""
    assert ObjectiveConfig(name="eopd_mix", gate_width=0.3).gate_width == 0.3
    with pytest.raises(ValueError, match=r"gate_width=0\.3 would be ignored with gate=hard"):
        ObjectiveConfig(name="eopd_mix", gate="hard", gate_width=0.3)


def test_contradicting_parts_are_refused_with_the_option_to_set(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text('run_dir = "r"\n[student]\nhf_path = "s"\n[teacher]\nhf_path = "t"\n')
    for overrides, message in (
        (["name=eopdd"], "name"),
        (["name=eopd_mix", "forward_kl_weight=1.5"], "weights of at most 1"),
        (["name=opd", "reverse_kl=none"], "nothing to minimise"),
        (["name=opd", "combine=interpolate"], "Set combine=add"),
        (["name=jsd", "inplace_backward=true"], "inplace_backward=false"),
        (["name=opd_sampled", "student_temperature=0.5"], "the same value"),
        (["top_k=0"], "top_k"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(toml, [f"objective.{o}" for o in overrides])


@pytest.mark.parametrize(
    ("preset", "changed"),
    [
        ("eopd", {"reverse_kl": "none"}),
        ("eopd", {"forward_kl": "none"}),
        ("eopd", {"gate": "sigmoid"}),
        ("eopd_mix", {"combine": "add"}),
        ("eopd", {"forward_kl_weight": 0.5}),
        ("eopd", {"entropy_threshold": 1.0}),
        ("eopd", {"final_entropy_threshold": 1.0}),
        ("eopd", {"final_forward_kl_weight": 0.5}),
        ("eopd", {"final_entropy_threshold": 1.0, "schedule_steps": 1}),
        ("eopd", {"final_entropy_threshold": 1.0, "schedule": "cosine"}),
        ("eopd_mix", {"gate_width": 0.3}),
        ("opd_sampled", {"clip_ratio": 0.5}),
        ("eopd_paper", {"top_k": 4}),
        ("eopd_paper", {"top_k_support": "student"}),
        ("eopd_paper", {"top_k_normalization": "tail"}),
        ("jsd", {"jsd_beta": 0.3}),
        ("skewed_kl", {"skew": 0.3}),
        ("eopd", {"gate": "student"}),
        ("eopd", {"gate": "disagreement"}),
        ("eopd", {"gate": "disagreement", "gate_max_overlap": 0.4}),
        ("eopd", {"reverse_kl_clip": 1.0}),
        ("eopd", {"forward_kl_clip": 1.0}),
        ("opd", {"token_weight": "position"}),
        ("opd", {"token_weight": "early"}),
        ("opd", {"token_weight": "early", "early_token_gain": 2.0}),
        ("opd", {"entropy_weight": "confidence"}),
        ("opd", {"entropy_weight": "confidence", "entropy_weight_floor": 0.5}),
        ("opd", {"entropy_weight": "confidence", "entropy_weight_scale": 0.3}),
        ("opd", {"ignored_token_ids": [3]}),
    ],
)
def test_no_option_is_read_and_then_forgotten(preset, changed, logits):
    """Every option of the objective changes the loss of its preset; one that is part of another,
    which comes first, that of the preset with the other."""
    values = []
    *others, _ = changed.items()
    for options in (dict(others), changed):
        objective = ObjectiveConfig.model_validate(
            {"name": preset, "entropy_threshold": 2.0} | options
        )
        at_half = coefficients_at(objective, after(1, of=3))
        signals = signals_of(logits, objective)
        off_policy = signals.rollout_logprobs_N - 0.7
        signals = replace(signals, rollout_logprobs_N=off_policy)
        entropy = signals.kl.teacher_entropy
        weight = token_weights(torch.linspace(0, 1, N), IDS, entropy, objective)
        values.append(token_objective(signals, objective, at_half, weight).loss_N)
    assert not torch.allclose(*values), changed


# Traps: what a faulty construction would give is far from what ours gives.


def test_a_detached_log_ratio_is_an_advantage_not_a_loss(logits):
    """k1 = log q − log p as a loss has a gradient that never sees the teacher; ours does."""
    student, teacher = logits
    gradients = []
    for scale in (1.0, -3.0):
        log_q = student.log_softmax(-1)[torch.arange(N), IDS]
        log_p = (scale * teacher).log_softmax(-1)[torch.arange(N), IDS]
        (faulty,) = torch.autograd.grad((log_q - log_p).sum(), student)
        ours = evaluate((student, scale * teacher), name="opd_sampled")[2]
        gradients.append((faulty, ours))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert (gradients[0][1] - gradients[1][1]).abs().max() > 0.1


def test_clipping_is_one_sided_as_in_ppo(logits):
    """Ratios beyond 1 ± ε lose their gradient only where following it would lead further away."""
    student, teacher = logits
    log_q = student.log_softmax(-1)[torch.arange(N), IDS].detach()
    log_p = teacher.log_softmax(-1)[torch.arange(N), IDS]
    for ratio in (0.5, 2.0):
        old = log_q - math.log(ratio)
        gradient = evaluate(logits, name="opd_sampled", rollout_logprobs=old)[2]
        has_gradient = gradient.abs().amax(-1) > 1e-9
        advantage = log_p - old
        assert torch.equal(has_gradient, advantage < 0 if ratio > 1 else advantage > 0)


def test_renormalising_the_student_inside_the_top_k_takes_the_pressure_off_the_tail(logits):
    """With k = 1 and both sides renormalised the KL is identically 0; the paper's form, the teacher
    only, still pulls probability into the support."""
    both = evaluate(logits, name="fkl", forward_kl="topk", top_k=1, top_k_normalization="both")
    paper = evaluate(logits, name="fkl", forward_kl="topk", top_k=1)
    assert both[0].abs().max() < 1e-6 and both[2].abs().max() < 1e-6
    assert (paper[2].abs().amax(-1) > 0.1).all()


def test_a_negative_truncated_kl_keeps_its_gradient(logits):
    """Without renormalisation a truncated KL is often negative; clamped at 0 it would be mute."""
    loss, _, gradient = evaluate(
        logits, name="opd", reverse_kl="topk", top_k=2, top_k_normalization="neither"
    )
    negative = loss < 0
    assert negative.sum() > 5
    assert (gradient[negative].abs().amax(-1) > 1e-4).all()


def test_top_k_gradient_weighs_the_teachers_mass(logits):
    """Σ p (log p − log q) over a support of teacher mass m: the gradient is m·q − p on the support,
    not q − p, which is off by tens of percent."""
    student, teacher = logits
    ours = evaluate(logits, name="fkl", forward_kl="topk", top_k=8, top_k_normalization="neither")[
        2
    ]
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    support = torch.zeros_like(p).scatter(-1, teacher.topk(8).indices, 1.0)
    mass = (p * support).sum(-1, keepdim=True)
    torch.testing.assert_close(ours, mass * q - support * p, rtol=1e-5, atol=1e-6)
    faulty = support * (q - p)
    assert (faulty - ours).norm() > 0.1 * ours.norm()


def test_bfloat16_probabilities_would_ruin_confident_rows():
    """q − p of probabilities rounded to bf16 is tens of percent off where both are near 1; ours is
    within one rounding of float64."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, 200, generator=generator)
    teacher = student + 0.1 * torch.randn(8, 200, generator=generator)
    student[:, 0] += 12
    teacher[:, 0] += 12
    student, teacher = student.bfloat16(), teacher.bfloat16()
    dense = student.double().requires_grad_()
    dense_kl_terms(dense, teacher.double()).forward_kl.sum().backward()
    leaf = student.clone().requires_grad_()
    vocab_parallel_kl_terms(leaf, teacher).forward_kl.sum().backward()
    faulty = student.float().softmax(-1).bfloat16() - teacher.float().softmax(-1).bfloat16()

    def error(gradient):
        return ((gradient.double() - dense.grad).norm() / dense.grad.norm()).item()

    assert error(leaf.grad) < 2**-8 and error(faulty) > 0.2


def test_temperature_divides_both_models(logits):
    """A teacher at T = 1 beside a student at the rollout temperature is another target."""
    teacher = logits[1]
    same = vocab_parallel_kl_terms(
        teacher, teacher, student_temperature=0.6, teacher_temperature=0.6
    )
    mixed = vocab_parallel_kl_terms(teacher, teacher, student_temperature=0.6)
    assert same.reverse_kl.abs().max() < 1e-5 and mixed.reverse_kl.max() > 0.05


def test_forward_leaves_the_logits_alone(logits):
    """Overwriting them in the forward would break every later reader, also with in-place on."""
    student, teacher = logits
    copies = student.detach().clone(), teacher.clone()
    vocab_parallel_kl_terms(student, teacher, inplace_backward=True)
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])
