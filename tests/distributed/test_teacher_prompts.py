"""A teacher that reads another prompt than the student, in every layout; and the cap on the tokens
of a response that are trained on."""

from dataclasses import replace

import pytest
import torch

from megatron_eopd.records import Rollout
from tests.dense_step import dense_step
from tests.distributed.parity import PAYLOADS, Case, distance, run_cases
from tests.distributed.test_parallelism import (
    TOLERANCE,
    VOCAB,
    make_models,
    own_layout,
    unequal_rollouts,
)
from tests.tiny_models import make_model

BUDGET = {"micro_batch_size": None, "max_tokens_per_microbatch": 64}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    more = make_model("qwen3_tied", path / "code", seed=6, hidden_size=32, initializer_range=0.2)
    return make_models(path) | {"code": more}


def with_solutions(rollouts: list[Rollout], names: tuple[str, ...] = ("teacher",)) -> list[Rollout]:
    """The teachers read other prompts, some shorter and some longer than the student's; of one they
    read the same."""
    generator = torch.Generator().manual_seed(5)

    def shown() -> tuple[int, ...]:
        length = int(torch.randint(1, 30, (), generator=generator))
        return tuple(torch.randint(VOCAB, (length,), generator=generator).tolist())

    prompts = [replace(r.prompt, teacher_ids={name: shown() for name in names}) for r in rollouts]
    prompts[3] = rollouts[3].prompt
    return [replace(r, prompt=p) for r, p in zip(rollouts, prompts, strict=True)]


@pytest.fixture(scope="session")
def rollouts():
    return with_solutions(unequal_rollouts(16, seed=11))


@pytest.fixture(scope="session")
def expected(models, rollouts):
    """Payload → what dense models in float64 find. The terms of the top k are others."""
    found = {
        payload: dense_step(Case(payload=payload).config(models), rollouts) for payload in PAYLOADS
    }
    assert found["hidden"]["metrics"]["loss/total"] > 0.1
    return found


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tp": 2, "sp": True, "pp": 2},
        {"pp": 2, "vpp": 2, "cp": 2},
        {"cp": 2, "dp": 2, "training": BUDGET},
        {"dp": 2, "training": BUDGET},
        {"tp": 2, "teacher": own_layout(pp=2)},
        {"pp": 2, "dp": 2, "teacher": own_layout(tp=4, sp=True)},
        {"cp": 2, "teacher": own_layout(tp=2, placement="separate", world_size=2)},
        {"pp": 2, "vpp": 2, "teacher": own_layout(placement="separate", world_size=2)},
    ],
    ids=lambda layout: Case(**layout).describe(),
)
def test_the_teacher_scores_the_response_behind_its_own_prompt(
    layout, models, rollouts, expected, tmp_path, capsys
):
    """Loss, terms and gradients are those of transformers' models in float64, for every payload,
    layout and placement."""
    cases = [Case(**layout, payload=payload) for payload in PAYLOADS]
    table = ""
    for case, found in zip(cases, run_cases(cases, models, rollouts, tmp_path), strict=True):
        far = distance(found, expected[case.payload])
        terms = 0.0 if case.payload == "topk" else far.terms  # of k + 1 parts, not of all
        table += f"\n  {case.describe():70} loss {far.loss:.1e} terms {terms:.1e} "
        table += f"gradients {far.gradients:.1e} ({far.worst})"
        assert max(far.loss, terms, far.gradients) < TOLERANCE, table
    with capsys.disabled():
        print(table)


def test_several_teachers_read_prompts_of_their_own(models, tmp_path):
    """One beside the student and one on a rank of its own; only the second reads another prompt for
    some of the student's, and only of its own lines."""
    plain = unequal_rollouts(16, seed=12)
    named = [
        replace(r, prompt=replace(r.prompt, teacher="code")) if n % 2 else r
        for n, r in enumerate(plain)
    ]
    rollouts = with_solutions(named, ("teacher", "code"))
    code = {"hf_path": models["code"]}
    apart = code | own_layout(placement="separate", world_size=1)
    for case in (
        Case(tp=2, other={"teachers": {"code": code}}),
        Case(tp=2, other={"teachers": {"code": apart}}),
    ):
        (found,) = run_cases([case], models, rollouts, tmp_path)
        far = distance(found, dense_step(case.config(models), rollouts))
        assert max(far.loss, far.terms, far.gradients) < TOLERANCE, (case, far)


def test_the_same_prompt_for_both_is_bitwise_a_run_without_one(models, tmp_path):
    """Every metric and gradient, where the teacher's prompt comes out as the student's."""
    plain = unequal_rollouts(16, seed=11)
    same = [
        replace(r, prompt=replace(r.prompt, teacher_ids={"teacher": r.prompt.prompt_ids}))
        for r in plain
    ]
    for layout in (
        {"tp": 2},
        {"dp": 2, "training": BUDGET},
        {"tp": 2, "teacher": own_layout(pp=2)},
    ):
        cases = [Case(**layout, payload=payload) for payload in PAYLOADS]
        for a, b in zip(
            run_cases(cases, models, plain, tmp_path),
            run_cases(cases, models, same, tmp_path),
            strict=True,
        ):
            assert a["metrics"] == b["metrics"]
            assert all(torch.equal(g, b["gradients"][n]) for n, g in a["gradients"].items())


@pytest.mark.parametrize("layout", [{}, {"cp": 2}, {"tp": 2, "pp": 2}, {"tp": 4}], ids=str)
def test_only_the_first_tokens_of_a_response_are_trained_on(layout, models, rollouts, tmp_path):
    """What is behind them enters neither the loss nor the number of tokens; positions are those in
    the whole response."""
    assert max(len(r.response_ids) for r in rollouts) > 12
    weighted = {"objective": {"max_trained_tokens": 12, "token_weight": "position"}}
    case = Case(**layout, other=weighted)
    count = case.config(models).objective.max_trained_tokens
    cut = [rollout.first_tokens(count) for rollout in rollouts]
    (found,) = run_cases([case], models, cut, tmp_path)
    far = distance(found, dense_step(case.config(models), rollouts))
    assert max(far.loss, far.terms, far.gradients) < TOLERANCE, far
