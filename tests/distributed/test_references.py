"""Batches in which some answers are references: the metrics of both sources, on several layouts."""

import dataclasses
import json

import pytest
import torch

from megatron_eopd.config import Config
from megatron_eopd.data.packing import make_microbatches
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import Rollout, ScoredRollout
from tests.distributed.test_models import random_rollouts
from tests.distributed.test_real_model import dense_logits_NV, write_metrics
from tests.distributed.test_step import make_config
from tests.ranks import run_ranks
from tests.tiny_models import make_model

REFERENCES = {"prompts": "p.jsonl", "response_key": "response"}


def mixed_rollouts() -> list[Rollout]:
    """Eight, of which every third is a reference."""
    rollouts = [s.rollout for s in random_rollouts(vocab_size=211, count=8, seed=11)]
    return [
        dataclasses.replace(r, source="reference" if i % 3 == 0 else "sampled")
        for i, r in enumerate(rollouts)
    ]


def config_with(head: str, models) -> Config:
    return make_config(
        models[1],
        models[0],
        data=REFERENCES,
        objective={"entropy_threshold": 2.8, "head": head, "head_chunk_size": 7},
        rollout={"batch_size": 8, "reference_fraction": 0.4},
        training={"global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-2, "adam_eps": 1e-3},
    )


def dense_by_source(models, rollouts: list[Rollout]) -> dict[str, float]:
    log_p, log_q = (dense_logits_NV(path, rollouts).log_softmax(-1) for path in models)
    is_sampled = torch.tensor([r.source == "sampled" for r in rollouts for _ in r.response_ids])
    values = {
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "forward_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
        "student_entropy": -(log_q.exp() * log_q).sum(-1),
    }
    values["gate_fraction"] = (values["teacher_entropy"] >= 2.8).double()
    values["loss"] = values["reverse_kl"] + values["gate_fraction"] * values["forward_kl"]
    return {
        f"{source}/{name}": x[mask].mean().item()
        for source, mask in (("sampled", is_sampled), ("reference", ~is_sampled))
        for name, x in values.items()
    }


@pytest.mark.parametrize("tp,pp,dp", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_both_sources_are_measured_as_dense_float64_does(tp, pp, dp, tmp_path):
    """With the whole head and the chunked one."""
    models = tuple(
        make_model("llama", tmp_path / name, seed=seed, tie_word_embeddings=True)
        for name, seed in (("teacher", 5), ("student", 1))
    )
    configs = [config_with(head, models) for head in ("materialized", "chunked")]
    rollouts, path = mixed_rollouts(), tmp_path / "found.json"
    run_ranks(tp * pp * dp, tmp_path, write_metrics, configs, rollouts, tp, pp, path)
    expected = dense_by_source(models, rollouts)
    for found in json.loads(path.read_text()):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("cp", [1, 2])
def test_every_token_knows_its_source(cp):
    rollouts = mixed_rollouts()
    scored = [[ScoredRollout(rollout) for rollout in rollouts]]
    total = sampled = 0
    for rank in range(cp):
        layout = Layout(tp=1, pp=1, dp=1, rank=rank, cp=cp)
        (batch,) = make_microbatches(scored, layout, torch.device("cpu"))
        total += len(batch.sampled_N)
        sampled += int(batch.sampled_N.sum())
    assert total == sum(len(r.response_ids) for r in rollouts)
    assert sampled == sum(len(r.response_ids) for r in rollouts if r.source == "sampled")
