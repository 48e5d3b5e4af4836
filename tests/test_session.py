"""Which engine a run gets, and that it says so."""

from types import SimpleNamespace

import pytest

from megatron_eopd import session
from megatron_eopd.config import Config
from megatron_eopd.rollout.megatron_engine import MegatronEngine
from megatron_eopd.run_log import RunLog


@pytest.mark.parametrize(
    "rollout,said",
    [
        ({"engine": "auto"}, "vLLM is NOT installed here"),
        ({"engine": "megatron"}, "as configured"),
        ({"replay": "recorded"}, "replayed from recorded"),
        ({"reference_fraction": 1}, "every iteration trains on reference answers"),
    ],
)
def test_the_exact_sampler_stands_in_and_says_why(rollout, said, monkeypatch, tmp_path):
    """Without vLLM, on demand, and where rollouts are replayed; never in silence."""
    monkeypatch.setattr(session, "vllm_available", lambda: False)
    config = Config.model_validate(
        {"run_dir": tmp_path, "student": {"hf_path": "s"}, "teacher": {"hf_path": "t"}}
        | {"rollout": rollout, "data": {"prompts": "p.jsonl", "response_key": "response"}}
    )
    inputs = SimpleNamespace(held_out=[])
    log = RunLog(tmp_path, rank=0)
    engine = session._make_engine(None, config, inputs, None, None, 112, None, log)
    log.close()
    assert isinstance(engine, MegatronEngine)
    assert said in (tmp_path / "log/rank0.txt").read_text()
