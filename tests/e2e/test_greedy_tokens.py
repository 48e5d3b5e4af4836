"""Converted checkpoints where users take them: to transformers, vLLM and the trainer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eopd.rollout.vllm_engine import vllm_available
from tests.tiny_models import make_model

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def greedy_tokens(reader: str, path: Path) -> list[list[int]]:
    printed = run(Path(__file__).with_name("greedy_tokens.py"), reader, path)
    return json.loads(printed.splitlines()[-1])


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(not vllm_available(), reason="vLLM is not installed")
def test_a_converted_model_writes_the_same_tokens_everywhere(tmp_path):
    """Hugging Face → Megatron on two ranks → Hugging Face; the trainer reads the one in the middle.
    vLLM stands for rope scaling that is not of this project's making. (Of experts a run compares
    it with the trainer, in test_train.py.)"""
    source = make_model("llama", tmp_path / "hf")
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    run(*TORCHRUN, "tools/convert_hf.py", "to-mcore", source, mcore)
    run("tools/convert_hf.py", "to-hf", mcore, back, "--max-shard-size", "500KB")
    assert len(list(back.glob("*.safetensors"))) > 1
    expected = greedy_tokens("transformers", source)
    assert len({token for row in expected for token in row}) > 5, "or nothing is compared"
    assert greedy_tokens("trainer", mcore) == expected
    assert greedy_tokens("vllm", back) == expected
