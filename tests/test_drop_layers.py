"""tools/drop_layers.py, against transformers' own model with the layers taken out of it."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_eopd.models.hf_files import INDEX
from tests.tiny_models import FAMILIES, make_model

TOOL = Path(__file__).parents[1] / "tools" / "drop_layers.py"
TOKEN_IDS = torch.arange(2, 42)[None]


@pytest.fixture
def tool() -> ModuleType:
    """A module of its own for every test, which may change it."""
    spec = importlib.util.spec_from_file_location("drop_layers", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits_without(hf_dir: Path, dropped: set[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(hf_dir)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(
        layer for number, layer in enumerate(layers) if number not in dropped
    )
    # Caches and tables by layer go by the old numbers; without a cache nothing asks for them.
    model.config.num_hidden_layers = len(model.model.layers)
    with torch.no_grad():
        return model(TOKEN_IDS, use_cache=False).logits


def logits_of(hf_dir: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(hf_dir, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model(TOKEN_IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers, dropped", [("1", {1}), ("0,2-3", {0, 2, 3})])
def test_the_model_is_the_one_with_the_layers_taken_out(
    tool, family_dirs, tmp_path, family, layers, dropped
):
    """Every logit to the last bit, in every family; which layers have experts included."""
    tool.drop_layers(family_dirs[family], tmp_path / "out", layers)
    found = logits_of(tmp_path / "out")
    assert torch.equal(found, logits_without(family_dirs[family], dropped))
    assert not torch.equal(found, logits_of(family_dirs[family]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 - len(dropped)
    assert len(config.get("layer_types", [1] * (4 - len(dropped)))) == 4 - len(dropped)


@pytest.mark.parametrize("family", ["qwen3", "llama_tied_with_biases"])
def test_sharded_weights_are_the_same_model(tool, family_dirs, tmp_path, monkeypatch, family):
    """Read from several files, written to several files, with an index that names them all."""
    source = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(family_dirs[family])
    model.save_pretrained(source, max_shard_size="150KB")
    assert (source / INDEX).is_file()
    monkeypatch.setattr(tool, "MAX_FILE_BYTES", 100_000)
    tool.drop_layers(source, tmp_path / "out", "1-2")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits_of(tmp_path / "out"), logits_without(source, {1, 2}))


def test_it_keeps_types_copies_files_and_prints_what_it_did(tool, qwen3_dir, tmp_path, capsys):
    source = shutil.copytree(qwen3_dir, tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text(f'"{name}"')
    assert tool.main([str(source), str(tmp_path / "out"), "--layers", "3, 0-1,1"]) == 0
    left = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in left.values()} == {torch.bfloat16}
    all_layers = load_file(source / "model.safetensors")
    before, after = (sum(t.numel() for t in tensors.values()) for tensors in (all_layers, left))
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed == [["layers", "4", "→", "1"], ["parameters", f"{before:,}", "→", f"{after:,}"]]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == f'"{name}"'
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize(
    "layers, message",
    [
        ("4", "there is no layer 4. The model has layers 0 to 3."),
        ("2-9", "there is no layer 9"),
        ("0-3", "none of 4 layers is left"),
        ("", "names no layer"),
        ("3-1", "'3-1' is no layer or range"),
        ("two", "'two' is no layer or range"),
        ("-1", "'-1' is no layer or range"),
    ],
)
def test_layers_that_cannot_be_dropped(tool, qwen3_dir, tmp_path, capsys, layers, message):
    assert tool.main([str(qwen3_dir), str(tmp_path / "out"), f"--layers={layers}"]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_alone(tool, qwen3_dir, tmp_path, capsys):
    (tmp_path / "precious").touch()
    assert tool.main([str(qwen3_dir), str(tmp_path), "--layers", "1"]) == 1
    assert f"error: {tmp_path} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type='gpt2', which is not supported"),
        ({"num_hidden_layers": 5}, "the weights have no model.layers.4"),
        ({"num_hidden_layers": 3, "layer_types": None}, "the weights have a model.layers.3"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers has 4 entries"),
        ({"layer_types": None, "use_sliding_window": True}, "Add layer_types, 4 entries"),
    ],
)
def test_models_that_are_not_understood(tool, qwen3_dir, tmp_path, capsys, changes, message):
    source = shutil.copytree(qwen3_dir, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    assert tool.main([str(source), str(tmp_path / "out"), "--layers", "1"]) == 1
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_quantised_and_damaged_weights(tool, tmp_path, capsys):
    source = make_model("qwen3", tmp_path / "source")
    weights = source / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, weights, {"format": "pt"})
    arguments = [str(source), str(tmp_path / "out"), "--layers", "1"]
    assert tool.main(arguments) == 1
    assert f"{name} has type int8" in capsys.readouterr().err
    weights.write_bytes(weights.read_bytes()[:5000])
    assert tool.main(arguments) == 1
    assert "damaged or truncated" in capsys.readouterr().err
    assert tool.main([str(tmp_path), str(tmp_path / "out"), "--layers", "1"]) == 1
    assert f"{tmp_path}: no config.json there" in capsys.readouterr().err
