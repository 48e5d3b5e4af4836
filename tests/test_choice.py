"""Which engine a run gets, that it says so, and what it refuses."""

import pytest

from megatron_eopd.config import Config
from megatron_eopd.errors import ConfigError
from megatron_eopd.rollout import choice
from megatron_eopd.rollout.choice import EngineChoice, choose_engine
from megatron_eopd.train import main
from tests.test_preflight import QUICKSTART, ROOT


@pytest.fixture
def choose(monkeypatch):
    """The choice of a run with these options of [rollout]."""

    def choose(installed: bool, task: str | None = None, **rollout) -> EngineChoice:
        monkeypatch.setattr(choice, "vllm_available", lambda: installed)
        config = Config.model_validate(
            {"run_dir": "r", "student": {"hf_path": "s"}, "teacher": {"hf_path": "t"}}
            | {"rollout": rollout, "data": {"prompts": "p.jsonl", "response_key": "response"}}
            | {"evaluation": {"tasks": task}}
        )
        return choose_engine(config)

    return choose


@pytest.mark.parametrize(
    "rollout,said",
    [
        ({"engine": "auto", "max_response_length": 256}, "vLLM is NOT installed here"),
        ({"engine": "megatron"}, "as configured"),
        ({"replay": "recorded"}, "replayed from recorded"),
        ({"reference_fraction": 1}, "every iteration trains on reference answers"),
    ],
)
def test_the_exact_sampler_stands_in_and_says_why(choose, rollout, said):
    """Without vLLM, on demand, and where rollouts are replayed; never in silence."""
    chosen = choose(installed=False, **rollout)
    assert not chosen.is_vllm and said in chosen.why


def test_vllm_where_it_is_installed(choose):
    assert choose(installed=True) == EngineChoice(True, "vLLM")
    assert choose(installed=True, reference_fraction=1, task="countdown").is_vllm
    assert not choose(installed=True, reference_fraction=1).is_vllm
    with pytest.raises(ConfigError, match=r"rollout\.engine=vllm, but vLLM is not installed here"):
        choose(installed=False, engine="vllm")


def test_it_does_not_stand_in_unasked_for_long_responses(choose):
    """At 4,096 tokens, the default, that would look like a hang."""
    with pytest.raises(ConfigError, match=r"max_response_length=4096 .*max_fallback_length=256"):
        choose(installed=False)
    with pytest.raises(ConfigError, match="replay starts no vLLM, so evaluations would come from"):
        choose(installed=True, replay="recorded", task="countdown")
    for asked in ({"engine": "megatron"}, {"max_fallback_length": 4096}):
        assert "exact sampler" in choose(installed=False, **asked).why
    assert not choose(installed=True, replay="recorded").is_vllm


def test_engines_on_ranks_of_their_own_are_vllms(choose):
    """Of a run that would start none, the configuration is refused."""
    separate = {"placement": "separate", "world_size": 2}
    assert choose(installed=True, **separate).is_vllm
    with pytest.raises(ValueError, match=r"this run starts none \(rollout\.engine=megatron"):
        choose(installed=True, engine="megatron", **separate)


def test_the_dry_run_says_it(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(choice, "vllm_available", lambda: False)
    assert main([str(QUICKSTART), "--dry-run"]) == 0
    assert "rollouts: the trainer's exact sampler (vLLM is NOT inst" in capsys.readouterr().out
    assert main([str(QUICKSTART), "--dry-run", "rollout.max_fallback_length=8"]) == 1
    assert "is above rollout.max_fallback_length=8" in capsys.readouterr().err
