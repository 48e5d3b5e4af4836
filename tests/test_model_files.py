"""Which model directories a run takes, and that planner, dry run and run say the same of each."""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from megatron_eopd import preflight
from megatron_eopd.config import load_config
from megatron_eopd.errors import CheckpointError, ConfigError, ExpectedError
from megatron_eopd.models.families import FAMILIES
from megatron_eopd.models.hf_config import read_hf_config, unknown_keys
from megatron_eopd.models.hf_files import HFCheckpoint
from megatron_eopd.models.tensor_shapes import tensor_shapes
from megatron_eopd.train import main
from tests.model_zoo import LLAMA, QWEN_2, QWEN_3, QWEN_3_MOE, RUNS, ZOO, without

ROOT = Path(__file__).parents[1]
STUDENT = ROOT / "examples/quickstart/models/student"
QUICKSTART = ROOT / "examples/quickstart/eopd.toml"
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


@pytest.fixture
def model_dir(tmp_path, monkeypatch) -> Callable[[dict[str, Any]], Path]:
    """Writes a directory with this config.json, random weights and the quick start's tokenizer."""

    def write(raw: dict[str, Any], weights_of: dict[str, Any] | None = None) -> Path:
        path = Path(shutil.copytree(STUDENT, tmp_path / "model", dirs_exist_ok=True))
        write_weights(weights_of or raw, path)
        (path / "config.json").write_text(json.dumps(raw))
        return path

    monkeypatch.chdir(ROOT)
    return write


def write_weights(raw: dict[str, Any], path: Path) -> None:
    """As transformers makes them. Rope has none, and not every spelling of it is transformers'."""
    shape = {key: value for key, value in raw.items() if key not in ROPE and value is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(shape.pop("model_type"), **without(shape, "attn_implementation"))
    )
    model.save_pretrained(path / "saved")
    shutil.move(path / "saved/model.safetensors", path / "model.safetensors")


def options_for(path: Path) -> list[str]:
    models = [f"{who}.hf_path={path}" for who in ("student", "teacher")]
    return [*models, "parallel.tensor_model_parallel_size=1", f"run_dir={path / 'run'}"]


@pytest.fixture
def plan(monkeypatch, capsys) -> Callable[[Path], tuple[int, str]]:
    """Runs the planner on a model; gives back its exit status and what it told on stderr."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tool sets it, and this takes it back

    def run(path: Path) -> tuple[int, str]:
        planner = runpy.run_path(str(ROOT / "tools/plan.py"))["main"]
        capsys.readouterr()
        gpus = ["--gpus", "1", "--gpu-memory-gib", "80"]
        status = planner([str(QUICKSTART), *gpus, *options_for(path)])
        return status, capsys.readouterr().err

    return run


def refusal(path: Path) -> str:
    """Of the checks that a dry run and a run begin with; "" if there is none."""
    try:
        preflight.check(load_config(QUICKSTART, options_for(path)), 1)
    except ExpectedError as error:
        return f"error: {error}\n"
    return ""


PLAIN = {"llama": LLAMA, "qwen2": QWEN_2, "qwen3": QWEN_3, "qwen3_moe": QWEN_3_MOE}


@pytest.mark.parametrize("name", ZOO)
def test_planner_and_start_take_the_same_config_files(name, model_dir, plan):
    """The planner has config.json alone, the run has the weights as well."""
    raw, outcome = ZOO[name]
    plain = PLAIN.get(raw.get("model_type"), LLAMA)
    path = model_dir(raw, raw if outcome == RUNS else plain)
    told = refusal(path)
    (path / "model.safetensors").unlink()
    status, planned = plan(path)
    if outcome == RUNS:
        assert (told, status) == ("", 0), planned
    else:
        assert outcome in told and told.count("\n") == 1, told
        assert (status, planned) == (2, told)


def test_a_dry_run_and_a_run_say_what_the_planner_says(model_dir, plan, monkeypatch, capsys):
    """Through their commands; a run stops before it meets another rank."""
    monkeypatch.setattr("megatron_eopd.launch.job_store", lambda *a, **k: pytest.fail("late"))
    for name in ("Qwen2 with windows", "Llama, dynamic rope", "Qwen3-8B-FP8"):
        raw, key = ZOO[name]
        path = model_dir(raw, PLAIN[raw["model_type"]])
        _, planned = plan(path)
        for command in (["--dry-run", "--world-size", "1"], []):
            assert main([str(QUICKSTART), *options_for(path), *command]) == 1
            assert capsys.readouterr().err == planned
        assert key in planned


# The tables of keys


def keys_read_in(source: str) -> set[str]:
    """Of config.json, as code of models reads them: config.name, or by getattr."""
    read = re.findall(r"(?<![\w.])(?:self\.|hf_|text_)?config\.([a-z]\w*)\b(?!\()", source)
    return {*read, *re.findall(r"(?:getattr|hasattr)\(\s*config,\s*\"(\w+)\"", source)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_reads_no_key_that_is_in_no_table(model_type):
    """Its configuration class, and its model."""
    config_class = CONFIG_MAPPING[model_type]
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    fields = {field.name for field in dataclasses.fields(config_class)}
    read = keys_read_in(inspect.getsource(module))
    assert {"hidden_size", "rope_parameters"} <= read
    assert (
        not {n for n in fields | read if not n.startswith("_")} - FAMILIES[model_type].keys.keys()
    )


# Of vLLM's own options, not of config.json.
VLLM_OPTIONS = {"eplb_config", "num_redundant_experts", "get_text_config"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_vllm_reads_no_key_that_is_in_no_table(model_type):
    vllm = importlib.util.find_spec("vllm")
    if vllm is None:
        pytest.skip("vLLM is not installed")
    models = Path(vllm.submodule_search_locations[0]) / "model_executor/models"
    read = keys_read_in((models / f"{model_type}.py").read_text())
    assert {"hidden_size", "rope_parameters"} <= read
    assert not read - VLLM_OPTIONS - FAMILIES[model_type].keys.keys()


def test_keys_that_nobody_knows_are_told_and_change_nothing(model_dir, plan):
    rope = {"rope_type": "linear", "factor": 2.0, "beta": 1}
    raw = without(QWEN_3, "rope_scaling") | {"rope_parameters": rope, "new": 1, "newer": None}
    path = model_dir(raw)
    assert refusal(path) == ""
    status, told = plan(path)
    assert status == 0 and told.startswith(f"warning: {path}: config.json has new, ")
    assert "has new, rope_parameters.beta, which nobody here knows" in told
    assert not hasattr(read_hf_config(path), "new")
    assert unknown_keys(STUDENT) is None


# Rope


THETA = {"rope_type": "default", "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
ROPES = {
    "top level": ({"rope_theta": 1e6}, THETA),
    "nothing": ({}, THETA | {"rope_theta": 1e4}),
    "empty": ({"rope_theta": 1e6, "rope_scaling": {}}, THETA),
    "old": ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR),
    "both words": (
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4}},
        LINEAR,
    ),
    "new": ({"rope_parameters": LINEAR}, LINEAR),
    "theta outside": (
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        LINEAR,
    ),
    "both spellings": ({"rope_parameters": LINEAR, "rope_scaling": LINEAR}, LINEAR),
    "by layer": (
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}},
        LINEAR,
    ),
    "by layer, theta outside": (
        {"rope_theta": 1e6, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
        THETA,
    ),
}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("spelling", ROPES)
def test_every_spelling_of_rope_is_read_alike(tmp_path, model_type, spelling):
    written, expected = ROPES[spelling]
    raw = without(PLAIN[model_type], *ROPE) | written
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_hf_config(tmp_path).rope_parameters == expected


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
BAD_ROPES = {
    "layers differ": (
        {"rope_parameters": {"full_attention": THETA, "sliding_attention": LINEAR}},
        "all layers must have the same rope",
    ),
    "layers and a number": (
        {"rope_parameters": {"full_attention": THETA, "rope_theta": 1e6}},
        "all layers must have the same rope",
    ),
    "no rope in some layers": (
        {"rope_parameters": {"full_attention": THETA, "sliding_attention": None}},
        "all layers must have the same rope",
    ),
    "two spellings": (
        {"rope_parameters": THETA, "rope_scaling": LINEAR},
        "rope_parameters and rope_scaling differ",
    ),
    "two thetas": (
        {"rope_theta": 1e4, "rope_parameters": THETA},
        "rope_theta=10000.0 is not rope_",
    ),
    "two types": ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "may be one of"),
    "dynamic": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "default, linear, llama3, yarn",
    ),
    "several positions": (
        {"rope_scaling": {"type": "default", "mrope_section": [1, 2, 5]}},
        "rope_scaling.mrope_section=[1, 2, 5]",
    ),
    "part of a head": (
        {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor=0.5",
    ),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "Missing required keys"),
    "text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, "no frequencies follow"),
    "null theta": ({"rope_theta": None}, "no frequencies follow"),
    "null beta": ({"rope_scaling": YARN | {"beta_fast": None}}, "rope_scaling.beta_fast=null"),
    "no object": ({"rope_scaling": "linear"}, "is no object"),
}


@pytest.mark.parametrize("case", BAD_ROPES)
def test_a_rope_that_cannot_be_had_is_named(tmp_path, case):
    written, message = BAD_ROPES[case]
    (tmp_path / "config.json").write_text(json.dumps(without(LLAMA, *ROPE) | written))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read_hf_config(tmp_path)
    assert "\n" not in str(error.value)


# Files


def config_text(text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda path: (path / "config.json").write_bytes(data)


def replaced_by(*names: str) -> Callable[[Path], object]:
    """The file of weights is gone, and these are there."""

    def replace(path: Path) -> None:
        (path / "model.safetensors").unlink()
        for name in names:
            (path / name).touch()

    return replace


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return edit


def without_config(*names: str) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        (path / "config.json").unlink()
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).touch()

    return replace


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BAD_FILES = {
    "UTF-16": (config_text(json.dumps(LLAMA).encode("utf-16")), "byte order mark, as UTF-16"),
    "bytes": (config_text(bytes(range(256))), "not UTF-8 text"),
    "byte order mark": (
        config_text(json.dumps(LLAMA).encode("utf-8-sig")),
        "begins with a byte order mark",
    ),
    "half": (config_text(json.dumps(LLAMA)[:100]), "not valid JSON"),
    "a pointer": (config_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "nothing": (config_text(""), "the file is empty"),
    "a list": (config_text("[]"), "expected a JSON object, got []"),
    "Megatron's": (without_config(".metadata"), "It is a Megatron checkpoint without"),
    "an adapter": (without_config("adapter_config.json"), "It is an adapter alone"),
    "Meta's": (without_config("consolidated.00.pth"), "It has Meta's own format"),
    "the hub's cache": (without_config("snapshots/0/config.json"), "give the one below snapshots/"),
    "a run's": (without_config("checkpoints/000010/config.json"), "give one below checkpoints/"),
    "pickles": (replaced_by("pytorch_model.bin"), "pytorch_model.bin, and only safetensors are"),
    "GGUF": (replaced_by("model-Q4_K_M.gguf"), "model-Q4_K_M.gguf, and only safetensors are read"),
    "one shard": (
        replaced_by("model-00001-of-00003.safetensors"),
        "has model-00001-of-00003.safetensors, and neither model.safetensors nor the",
    ),
    "no head": (changed(lambda t: t.pop("lm_head.weight")), "missing, and tie_word_embeddings is"),
    "no weight": (changed(lambda t: t.pop(Q_PROJ)), f"{Q_PROJ}: missing"),
    "a bias": (
        changed(lambda t: t.update({Q_PROJ.replace("weight", "bias"): torch.zeros(64)})),
        "q_proj.bias: unexpected",
    ),
    "a shape": (changed(lambda t: t.update({Q_PROJ: t[Q_PROJ][:32].clone()})), "shape [32, 64]"),
    "fp8": (
        changed(lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.float8_e4m3fn)})),
        f"{Q_PROJ}: type F8_E4M3 is not supported, being quantised: take the model",
    ),
    "int8": (
        changed(lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)})),
        "type I8 is not supported, only floating point is",
    ),
    "float64": (
        changed(lambda t: t.update({Q_PROJ: t[Q_PROJ].double()})),
        "type F64 is not supported, only F32, BF16 and F16 are",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named_alike_by_planner_and_start(case, model_dir, plan):
    damage, message = BAD_FILES[case]
    path = model_dir(LLAMA)
    damage(path)
    told = refusal(path)
    assert message in told and str(path) in told
    assert plan(path) == (2, told)


def test_a_path_that_is_no_directory(tmp_path):
    for path, message in (
        (tmp_path / "nowhere", "There is no such directory"),
        (STUDENT / "config.json", "It is a file"),
    ):
        with pytest.raises(ConfigError, match=f"no config.json there. {message}"):
            read_hf_config(path)


def test_a_run_s_folder_says_where_its_models_are(tmp_path):
    options = {"run_dir": "x", "student": {}, "teacher": {}, "rollout": {}}
    (tmp_path / "config.json").write_text(json.dumps(options))
    (tmp_path / "checkpoints/000002").mkdir(parents=True)
    (tmp_path / "checkpoints/000002/DONE").touch()
    with pytest.raises(ConfigError, match=r"options of a run\. Give its folder hf, or"):
        read_hf_config(tmp_path)
    with pytest.raises(ConfigError, match="holds the checkpoints of a run: give one of them"):
        read_hf_config(tmp_path / "checkpoints")


def test_a_megatron_checkpoint_is_no_hugging_face_directory(tmp_path):
    (tmp_path / ".metadata").touch()
    with pytest.raises(CheckpointError, match="is a Megatron checkpoint, where a Hugging Face"):
        HFCheckpoint(tmp_path)


TIED = QWEN_3 | {"tie_word_embeddings": True}


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_a_head_that_is_the_embedding_may_have_another_type(model_dir, head_dtype):
    """And nothing else about it may differ; the last row would be overlooked first."""

    def add(tensors: dict[str, torch.Tensor], spoil: float) -> None:
        head = tensors["model.embed_tokens.weight"].to(head_dtype)
        tensors["lm_head.weight"] = head.clone()
        tensors["lm_head.weight"][-1, -1] += spoil

    path = model_dir(TIED)
    changed(lambda t: add(t, 0.0))(path)
    assert refusal(path) == ""
    changed(lambda t: add(t, 1.0))(path)
    assert "lm_head.weight: differs from the embedding, but tie_word" in refusal(path)


def test_a_head_that_the_embedding_was_rounded_from(model_dir):
    path = model_dir(TIED)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float() * (1 + 2**-12)

    changed(add)(path)
    assert "(by the rounding of F32 and BF16 alone): remove it, or set" in refusal(path)


def test_the_tensors_that_a_model_must_have_are_those_that_transformers_writes(family_dirs):
    for family, path in family_dirs.items():
        with HFCheckpoint(path) as checkpoint:
            written = {name: checkpoint.slice(name).shape for name in checkpoint.names()}
        assert tensor_shapes(read_hf_config(path)) == written, family


# The page


PAGE = (ROOT / "docs/checkpoints.md").read_text()


def test_the_page_lists_every_form_of_the_zoo():
    forms: dict[tuple[str, str], list[str]] = {}
    for name, (raw, outcome) in ZOO.items():
        told = "takes" if outcome == RUNS else f"refuses, by `{outcome}`"
        forms.setdefault((raw.get("model_type", ""), told), []).append(name)
    rows = [
        f"| {family} | {told} | {'; '.join(names)} |" for (family, told), names in forms.items()
    ]
    table = "\n".join(["| `model_type` | a run | forms |", "|---|---|---|", *sorted(rows)])
    assert table in PAGE, f"\n{table}"
