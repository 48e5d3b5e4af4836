"""Converted checkpoints where users take them: to transformers, vLLM and the trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_eopd.models.hf_files import HFCheckpoint
from megatron_eopd.models.mcore_files import MCoreCheckpoint
from megatron_eopd.rollout.vllm_options import vllm_available
from tests.tiny_models import make_model

ROOT = Path(__file__).parents[2]
CONVERT = ROOT / "tools/convert_hf.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def greedy_tokens(*readers_and_models: object) -> list[list[list[int]]]:
    """Of each reader of a model, in their order."""
    printed = run(Path(__file__).with_name("greedy_tokens.py"), *readers_and_models)
    return [json.loads(line) for line in printed.splitlines()[-len(readers_and_models) // 2 :]]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> tuple[Path, str]:
    """(Megatron checkpoint of two ranks, what was printed): as a user starts the tool elsewhere
    than in the repository, with an output that is relative to there."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    printed = run(*TORCHRUN, CONVERT, "to-mcore", source, "mcore/", cwd=elsewhere)
    return elsewhere / "mcore", printed


def test_torchrun_converts_from_any_directory(source, converted):
    """Two ranks, a relative output, and what is said is said once."""
    mcore, printed = converted
    assert printed.splitlines() == [f"{mcore}: a Megatron checkpoint of {source}"]
    with HFCheckpoint(source) as checkpoint:
        assert checkpoint.count_dtypes(checkpoint.names()) == {torch.float32: 39}
    assert MCoreCheckpoint(mcore).embedding_dtype() == torch.float32


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(not vllm_available(), reason="vLLM is not installed")
def test_a_converted_model_writes_the_same_tokens_everywhere(source, converted, tmp_path):
    """Hugging Face → Megatron on two ranks → Hugging Face; the trainer reads the one in the middle.
    vLLM stands for rope scaling that is not of this project's making. (Of experts a run compares
    it with the trainer, in test_train.py.)"""
    mcore, back = converted[0], tmp_path / "back"
    run(CONVERT, "to-hf", mcore, back, "--max-shard-size", "500KB")
    assert len(list(back.glob("*.safetensors"))) > 1
    expected, ours = greedy_tokens("transformers", source, "trainer", mcore)
    assert len({token for row in expected for token in row}) > 5, "or nothing is compared"
    assert ours == expected
    assert greedy_tokens("vllm", back) == [expected]
