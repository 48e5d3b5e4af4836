"""Tiny random Qwen3 directories, made once per test run."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def make_qwen3(path: Path, *, seed: int, **overrides) -> Path:
    """A random float32 Qwen3; its weights are large enough that a wrong one shows in the logits."""
    shape = {
        "vocab_size": 211,  # prime: no tensor-parallel size divides it
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # × 4 heads ≠ hidden size
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "initializer_range": 0.1,
    }
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**(shape | overrides))).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def qwen3_dir(tmp_path_factory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("qwen3"), seed=0)


@pytest.fixture(scope="session")
def tied_qwen3_dir(tmp_path_factory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("qwen3_tied"), seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    """Another width and depth than the student's; surer of itself, so that the gate has something
    to tell apart: entropies from 0.7 to 4 nats."""
    path = tmp_path_factory.mktemp("teacher")
    return make_qwen3(path, seed=5, hidden_size=96, num_hidden_layers=2, initializer_range=0.2)
