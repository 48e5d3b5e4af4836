"""Models of one tokenizer with other numbers of columns: the tokens decide, columns past them are
padding on either side.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.records import Rollout
from tests.dense_objective import dense_token_loss
from tests.distributed.parity import PAYLOADS, Case, run_cases
from tests.distributed.test_parallelism import own_layout, unequal_rollouts
from tests.tiny_models import make_model

NUM_TOKENS = 110
COLUMNS = {"student": 128, "teacher": 144}
TOLERANCE = 1e-5
TEMPERATURE = 0.8
# So that the two models are cut at other columns for every tensor-parallel size but 1.
OTHER = {"model": {"make_vocab_size_divisible_by": 8}}


@pytest.fixture(scope="module", params=["student is narrower", "teacher is narrower"])
def models(request, tmp_path_factory):
    """Weights so large that padding would have much of every softmax."""
    path = tmp_path_factory.mktemp("widths")
    columns = list(COLUMNS.values())
    if request.param == "teacher is narrower":
        columns.reverse()
    options = {"initializer_range": 0.15, "num_hidden_layers": 2}
    return {
        name: make_model(family, path / name, seed=seed, vocab_size=width, **options)
        for (name, family, seed), width in zip(
            (("student", "qwen3_tied", 1), ("teacher", "qwen3", 2)), columns, strict=True
        )
    }


def of_tokens(rollout: Rollout) -> Rollout:
    """With every id brought below NUM_TOKENS."""

    def within(ids):
        return tuple(i % NUM_TOKENS for i in ids)

    prompt = replace(rollout.prompt, prompt_ids=within(rollout.prompt.prompt_ids))
    return replace(rollout, prompt=prompt, response_ids=within(rollout.response_ids))


def dense(
    models: dict[str, Path], rollouts: list[Rollout], objective: ObjectiveConfig
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and the student's gradients, float64, over the tokens and nothing else."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float64)
        for name in ("student", "teacher")
    )
    num_tokens = sum(len(r.response_ids) for r in rollouts)
    total = 0.0
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.prompt_ids, *rollout.response_ids]])
        rows = slice(len(rollout.prompt.prompt_ids) - 1, -1)
        with torch.no_grad():
            teacher_logits = teacher(ids).logits[0, rows, :NUM_TOKENS]
        loss_N, _ = dense_token_loss(
            student(ids).logits[0, rows, :NUM_TOKENS],
            teacher_logits,
            torch.tensor(rollout.response_ids),
            torch.tensor(rollout.response_logprobs, dtype=torch.float64),
            torch.zeros(len(rollout.response_ids), dtype=torch.float64),
            objective,
            alpha=1.0,
            tau=objective.entropy_threshold,
            student_temperature=TEMPERATURE,
            teacher_temperature=TEMPERATURE,
        )
        (loss_N.sum() / num_tokens).backward()
        total += loss_N.sum().item() / num_tokens
    return total, {name: p.grad for name, p in student.named_parameters()}


def cases(**layout) -> list[Case]:
    chunked = {"objective": {"head": "chunked", "head_chunk_size": 16}}
    shared = {"vocab_size": NUM_TOKENS} | layout
    found = [Case(payload=payload, other=OTHER, **shared) for payload in PAYLOADS]
    return found + [Case(payload=p, other=OTHER | chunked, **shared) for p in ("hidden", "logits")]


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tp": 2},
        {"pp": 2},
        {"tp": 2, "teacher": own_layout(pp=2)},
        {"teacher": own_layout(placement="separate", world_size=1)},
    ],
    ids=["TP 1", "TP 2", "PP 2", "TP 2, teacher PP 2", "separate"],
)
def test_only_tokens_enter_loss_and_gradients(layout, models, tmp_path):
    rollouts = [of_tokens(rollout) for rollout in unequal_rollouts(16, seed=7)]
    runs = cases(**layout)
    for case, found in zip(runs, run_cases(runs, models, rollouts, tmp_path), strict=True):
        config = case.config(models)
        loss, gradients = dense(models, rollouts, config.objective)
        assert found["metrics"]["loss/total"] == pytest.approx(loss, rel=TOLERANCE), case.describe()
        for name, gradient in found["gradients"].items():
            difference = (gradient.double() - gradients[name]).norm() / gradients[name].norm()
            assert difference < TOLERANCE, (case.describe(), name)
        embedding = found["gradients"]["model.embed_tokens.weight"]
        assert not embedding[NUM_TOKENS:].any(), "no gradient reaches padding"
        assert embedding[:NUM_TOKENS].any(dim=-1).all(), "every token of the softmax has one"
