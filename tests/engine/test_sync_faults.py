"""What goes wrong in a weight sync although every byte arrived, in float32 and in bfloat16.

Checksums, names and versions are right in all of them: only what the engine computes tells.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_eopd.config import Config, WeightSyncConfig
from megatron_eopd.health import HealthCheck
from megatron_eopd.records import Prompt
from megatron_eopd.rollout import engine_process, vllm_options
from megatron_eopd.rollout.engine import Sampling, SyncReport
from megatron_eopd.rollout.vllm_options import llm_arguments, vllm_available
from megatron_eopd.weight_sync.verify import SyncCheck, probe_sequences
from tests.engine.toy import ToyTrainer, scores
from tests.tiny_models import make_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not vllm_available(), reason="vLLM is not installed"),
]
LONG = 160
"""Tokens of a prompt: more than the 128 of a block of vLLM's cache on a CPU."""
SAMPLING = Sampling(2, temperature=1.0, max_response_length=16, stop_ids=(), seed=7)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request, world, tmp_path_factory):
    """(trainer, engine), in step; the engine never forgets its prefix cache by itself."""
    path = tmp_path_factory.mktemp("faults")
    model = make_model("qwen3", path / "model", vocab_size=256, max_position_embeddings=256)
    trainer = ToyTrainer(model, dtype=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "CHILD_MODULE", "tests.engine.forgetful_child")
        # There is no prefix cache on a CPU otherwise.
        patch.setattr(
            vllm_options,
            "llm_arguments",
            lambda *given: llm_arguments(*given) | {"enable_prefix_caching": True},
        )
        engine = trainer.start_engine(path / "engine.txt", max_model_len=256)
    engine.update_weights(0)
    yield trainer, engine
    engine.close()


def prompts(seed: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (4, LONG), generator=generator).tolist()
    return [Prompt(i, "", "", tuple(row)) for i, row in enumerate(ids)]


def judge(pair, check: SyncCheck):
    trainer, engine = pair
    rollouts = engine.generate(prompts(1), SAMPLING)
    probes = probe_sequences(prompts(1), rollouts, max_tokens=250)
    (found,) = scores(engine, probes)
    return check.judge(found, [trainer.score(ids) for ids in probes], version=1)


def export_with(trainer: ToyTrainer, changes: dict[str, torch.Tensor]):
    """The trainer's buckets, some tensors of which are others."""
    state = trainer.model.state_dict() | changes
    return lambda: ([state[name] for name in bucket] for bucket in trainer.stages[0])


def layer(trainer: ToyTrainer, number: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{number}."
    state = trainer.model.state_dict()
    return {name: t.clone() for name, t in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("fault", ["stale layer", "swapped pair", "missed update"])
def test_the_probe_finds_it(pair, fault, monkeypatch):
    trainer, engine = pair
    check = SyncCheck(WeightSyncConfig(), trainer.dtype)
    assert judge(pair, check).verdict == "sound"
    before = layer(trainer, 1)
    trainer.train(seed=3)
    if fault == "stale layer":
        monkeypatch.setattr(engine._own.outlet, "_export_buckets", export_with(trainer, before))
    if fault == "swapped pair":
        name = "model.layers.{}.self_attn.q_proj.weight"
        first, second = (trainer.model.state_dict()[name.format(n)] for n in (0, 1))
        swapped = {name.format(0): second, name.format(1): first}
        monkeypatch.setattr(engine._own.outlet, "_export_buckets", export_with(trainer, swapped))
    if fault != "missed update":
        engine.update_weights(1)
    found = judge(pair, check)
    monkeypatch.undo()
    engine.update_weights(1)
    assert found.verdict == "stop", found
    assert judge(pair, check).verdict == "sound"


def test_the_mismatch_finds_a_stale_prefix_cache(pair, monkeypatch):
    """The engine's weights are new, and the keys and values of a known prompt are not."""
    trainer, engine = pair
    told: list[str] = []
    config = Config.model_validate(
        {
            "run_dir": "run",
            "student": {"hf_path": "student"},
            "teacher": {"hf_path": "teacher"},
            "model": {"dtype": trainer.dtype},
        }
    )
    health = HealthCheck(config, SimpleNamespace(line=told.append))

    def look() -> None:
        differences = [
            abs(ours - theirs)
            for rollout in engine.generate(prompts(2), SAMPLING)
            for ours, theirs in zip(
                rollout.response_logprobs,
                trainer.score(rollout.prompt.prompt_ids + rollout.response_ids)[LONG - 1 :],
                strict=True,
            )
        ]
        error = sum(math.exp(x) for x in differences) / len(differences)
        scalars = {"mismatch/mult_prob_error": error, "rollout/length_mean": 16.0}
        scalars |= {"entropy/student_mean": 1.0, "entropy/teacher_mean": 1.0}
        health.look(scalars, SyncReport(1, 0.0, 0))

    look()
    look()
    assert not told, "in step, and with a warm cache"
    trainer.train(seed=4)
    engine.update_weights(2)
    look()
    assert len(told) == 1 and "engine and trainer disagree" in told[0]
