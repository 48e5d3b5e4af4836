"""Several teachers of the same tokens, and told apart."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_eopd.records import ALL_TEACHERS, Rollout
from tests.dense_step import dense_step
from tests.distributed.parity import PAYLOADS, Case, distance, run_cases
from tests.distributed.test_parallelism import (
    TOLERANCE,
    make_models,
    own_layout,
    unequal_rollouts,
)
from tests.distributed.test_teacher_prompts import with_solutions
from tests.tiny_models import make_model

WEIGHTS = {"teacher": 0.6, "code": 1.5, "late": 0.3}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("several")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    sure = {"initializer_range": 0.2}
    return make_models(path) | {
        "code": make_model("qwen3_tied", path / "code", seed=6, hidden_size=32, **heads, **sure),
        "late": make_model("qwen3", path / "late", seed=7, **heads, **sure),
    }


@pytest.fixture(scope="session")
def rollouts():
    """Of most prompts every teacher speaks, of some one alone; two read prompts of their own."""
    scored_by = [ALL_TEACHERS, "code", ALL_TEACHERS, ALL_TEACHERS, "teacher", ALL_TEACHERS]
    named = [
        replace(r, prompt=replace(r.prompt, teacher=scored_by[n % len(scored_by)]))
        for n, r in enumerate(unequal_rollouts(16, seed=21))
    ]
    return with_solutions(named, ("teacher", "code"))


def case_of(models, mixture: str, *, code: dict | None = None, late: dict | None = None, **case):
    payload = case.get("payload", "hidden")
    others = {
        name: {"hf_path": models[name], "payload": payload, "weight": WEIGHTS[name]} | (own or {})
        for name, own in (("code", code), ("late", late))
    }
    objective = case.pop("objective", {}) | {"teacher_mixture": mixture}
    teacher = case.pop("teacher", {}) | {"weight": WEIGHTS["teacher"]}
    return Case(**case, teacher=teacher, other={"teachers": others, "objective": objective})


APART = own_layout(placement="separate", world_size=1)
LAYOUTS = {
    "alone": ({}, PAYLOADS),
    "tp 2, pp 2": ({"tp": 2, "pp": 2, "sp": True}, ("hidden",)),
    "cp 2, dp 2": ({"cp": 2, "dp": 2}, ("topk", "logits")),
    "tp 4": ({"tp": 4}, ("hidden",)),
    "own layouts": ({"tp": 2, "code": own_layout(pp=2), "late": APART}, PAYLOADS),
    "chunked": ({"tp": 2, "objective": {"head": "chunked", "head_chunk_size": 16}}, ("hidden",)),
}
"""Options of a case, and the payloads that it is tried with."""


@pytest.fixture(scope="session")
def dense(models, rollouts):
    """(mixture, whether of the top k) → what dense models find."""

    @cache
    def find(mixture: str, of_top_k: bool) -> dict:
        case = case_of(models, mixture, payload="topk" if of_top_k else "hidden")
        return dense_step(case.config(models), rollouts)

    return find


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mixture", ["divergences", "distributions"])
def test_a_mixture_is_that_of_dense_models_in_float64(
    mixture, name, models, rollouts, dense, tmp_path
):
    """Loss and every gradient, and of distributions the terms of every token; over layouts, heads,
    placements and the payloads that a mixture can be made of."""
    options, payloads = LAYOUTS[name]
    fit = [p for p in payloads if p != "topk" or mixture == "divergences"]
    cases = [case_of(models, mixture, **options | {"payload": p}) for p in fit]
    for case, found in zip(cases, run_cases(cases, models, rollouts, tmp_path), strict=True):
        far = distance(found, dense(mixture, case.payload == "topk"))
        assert max(far.loss, far.terms, far.gradients) < TOLERANCE, (case.payload, far)


def test_weights_without_a_mixture(models, tmp_path):
    """Each token has one teacher, and its loss that one's weight; figures are those of its own
    tokens."""
    names = ["teacher", "code", "late"]
    rollouts = [
        replace(r, prompt=replace(r.prompt, teacher=names[n % 3]))
        for n, r in enumerate(unequal_rollouts(12, seed=22))
    ]
    case = case_of(models, "none", tp=2)
    (found,) = run_cases([case], models, rollouts, tmp_path)
    far = distance(found, dense_step(case.config(models), rollouts))
    assert max(far.loss, far.terms, far.gradients) < TOLERANCE, far
    metrics, terms = found["metrics"], found["terms"]
    total = sum(len(r.response_ids) for r in rollouts)
    for name in names:
        own = {r.prompt.index for r in rollouts if r.prompt.teacher == name}
        rows = torch.stack([row for key, row in terms.items() if key[0] in own]).double()
        assert metrics[f"teacher/{name}/token_share"] == pytest.approx(len(rows) / total)
        for n, term in enumerate(("reverse_kl", "forward_kl", "entropy")):
            assert metrics[f"teacher/{name}/{term}"] == pytest.approx(rows[:, n].mean().item())
        gate = (rows[:, 2] >= 2.8).double().mean().item()
        assert metrics[f"teacher/{name}/gate_fraction"] == pytest.approx(gate)
    parts = [metrics[f"teacher/{n}/loss"] * metrics[f"teacher/{n}/token_share"] for n in names]
    assert sum(parts) == pytest.approx(metrics["loss/total"])


def test_figures_of_a_sum_over_teachers(models, rollouts, tmp_path):
    """Each teacher's are those of a run with it alone, at the tokens of which it speaks."""
    (found,) = run_cases([case_of(models, "divergences")], models, rollouts, tmp_path)
    total = sum(len(r.response_ids) for r in rollouts)
    figures = {
        "reverse_kl": "loss/reverse_kl",
        "forward_kl": "loss/forward_kl",
        "gate_fraction": "gate/fraction",
        "entropy": "entropy/teacher_mean",
    }
    for name in WEIGHTS:
        own = [spoken_by(name, r) for r in rollouts if r.prompt.is_scored_by(name)]
        alone = models | {"teacher": models[name]}
        (expected,) = run_cases([Case()], alone, own, tmp_path)
        for figure, of_all in figures.items():
            mine = found["metrics"][f"teacher/{name}/{figure}"]
            assert mine == pytest.approx(expected["metrics"][of_all], rel=1e-5)
        share = sum(len(r.response_ids) for r in own) / total
        assert found["metrics"][f"teacher/{name}/token_share"] == pytest.approx(share)


def spoken_by(name: str, rollout: Rollout) -> Rollout:
    """As this teacher reads it, were it the only one."""
    prompt = rollout.prompt
    shown = {"teacher": prompt.ids_for(name)}
    return replace(rollout, prompt=replace(prompt, teacher="teacher", teacher_ids=shown))
