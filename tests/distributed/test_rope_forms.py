"""Megatron-Core models against transformers, for every kind of arithmetic that the config.json of
a published model asks for: its keys as they are written, and the same logits."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.test_models import (
    load_into,
    random_rollouts,
    response_logits,
    transformers_logits,
)
from tests.model_zoo import LLAMA, QWEN_2, QWEN_3, QWEN_3_MOE, YARN, ZOO, without
from tests.ranks import context_for, leave_groups, run_ranks

# So short that a scaling shows within the few tokens of a test.
SHORT_YARN = YARN | {"original_max_position_embeddings": 16}
LLAMA_3 = ZOO["Llama-3.1"][0]
SHORT_LLAMA_3 = LLAMA_3["rope_scaling"] | {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
QWEN_3_NO_ROPE = without(QWEN_3, "rope_theta", "rope_scaling")
FORMS: dict[str, dict[str, Any]] = {
    "no theta": LLAMA,
    "linear": ZOO["deepseek-coder"][0],
    "llama3": LLAMA_3 | {"rope_scaling": SHORT_LLAMA_3},
    "a head for every query": LLAMA | {"num_key_value_heads": None, "head_dim": None},
    "biases": ZOO["Llama with biases"][0],
    "yarn, head_dim null": QWEN_2 | {"rope_scaling": SHORT_YARN, "head_dim": None},
    "theta above yarn": without(QWEN_3, "rope_scaling") | {"rope_parameters": SHORT_YARN},
    "by layer": QWEN_3_NO_ROPE | {"rope_parameters": {"full_attention": LINEAR}},
    "tied": ZOO["Qwen3-0.6B"][0],
    "experts": QWEN_3_MOE | {"norm_topk_prob": False},
}
# In words that transformers can read, where it cannot read the form.
READABLE = {
    "yarn, head_dim null": without(FORMS["yarn, head_dim null"], "head_dim"),
    "by layer": QWEN_3_NO_ROPE | {"rope_parameters": LINEAR},
}


def write_model(name: str, path: Path) -> Path:
    """With weights so large that a wrong one, or a wrong angle, shows in the logits; in float32.
    transformers itself is given the readable words."""
    raw = without(READABLE.get(name, FORMS[name]), "torch_dtype")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    model.save_pretrained(path)
    return path


def check_forms(dirs, scored, expected):
    """TP 2."""
    context = context_for(2, 1, sequence_parallel=True)
    for name, path in dirs.items():
        model, hf_config = load_into(context, path)
        found = torch.cat(response_logits(model.eval(), hf_config, context, scored))
        worst = (found - expected[name]).abs().max()
        assert worst < 1e-4, f"{name}: {worst}"
    leave_groups()


def test_every_form_gives_the_logits_of_transformers(tmp_path):
    """Within 1e-4 in float32, of logits up to 7."""
    scored = random_rollouts(vocab_size=112, count=4, seed=4)
    dirs = {name: write_model(name, tmp_path / name) for name in FORMS}
    with torch.no_grad():
        expected = {name: transformers_logits(path, scored) for name, path in dirs.items()}
    for name, path in dirs.items():
        (path / "config.json").write_text(json.dumps(FORMS[name]))
    run_ranks(2, tmp_path, check_forms, dirs, scored, expected)


def test_a_form_read_otherwise_would_show(tmp_path):
    """Without its scaling each rope gives logits that differ by far more than is allowed above."""
    scored = random_rollouts(vocab_size=112, count=2, seed=4)
    for name in ("linear", "llama3", "theta above yarn", "by layer"):
        path = write_model(name, tmp_path / name)
        raw = json.loads((path / "config.json").read_text())
        with torch.no_grad():
            expected = transformers_logits(path, scored)
            raw["rope_parameters"] = {"rope_theta": raw["rope_parameters"]["rope_theta"]}
            (path / "config.json").write_text(json.dumps(raw))
            assert (transformers_logits(path, scored) - expected).abs().max() > 0.1, name
