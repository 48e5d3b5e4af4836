"""Whatever a user brings that cannot be right: one message, no traceback, exit code 1, before any
process group, at one rank and at two.
"""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from megatron_eopd.train import main
from tests.test_resume import finish_checkpoint
from tests.tiny_models import make_model
from tests.tiny_tokenizers import byte_level

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples/quickstart/models"
QUICKSTART = ROOT / "examples/quickstart/eopd.toml"

Spoil = Callable[[Path], list[str] | None]
"""What spoils a copy of the student, or writes a prompt file beside it and gives the options."""


def config(**changes) -> Spoil:
    def spoil(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def template(text: str, **config) -> Spoil:
    def spoil(model: Path) -> list[str]:
        path = model / "tokenizer_config.json"
        changed = json.loads(path.read_text()) | {"chat_template": text} | config
        path.write_text(json.dumps(changed))
        return ["data.apply_chat_template=true"]

    return spoil


def prompts(content: str | bytes, name: str = "prompts.jsonl") -> Spoil:
    def spoil(model: Path) -> list[str]:
        path = model.parent / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [f"data.prompts={path}", "evaluation.tasks=none"]

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return spoil


def write(name: str, content: str | bytes, *, instead_of: str | None = None) -> Spoil:
    def spoil(model: Path) -> None:
        (model / (instead_of or name)).unlink(missing_ok=True)
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def one_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00003.safetensors")


def only_bin(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def legacy_megatron(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "mp_rank_00").mkdir()
    (model / "mp_rank_00/model_optim_rng.pt").touch()


def loses_spaces(model: Path) -> None:
    """A byte-level tokenizer whose pre-tokenizer was replaced by another model's."""
    make_model("qwen3", model, vocab_size=400)
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(model / "tokenizer.json"))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ROPE = {"rope_type": "default", "rope_theta": 1e4}
QUESTION = '{"prompt": "1 2 3 4 -> 10 :"}\n'
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}

BAD: dict[str, tuple[Spoil, str]] = {
    # config.json
    "sliding window": (config(use_sliding_window=True, sliding_window=16), "sliding_window"),
    "dynamic rotary": (
        config(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "dynamic",
    ),
    "partial rotary": (config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "rotary by layer type": (
        config(
            rope_parameters={
                "full_attention": ROPE,
                "sliding_attention": ROPE | {"rope_theta": 5e5},
            }
        ),
        "rope_parameters",
    ),
    "gelu": (config(hidden_act="gelu"), "hidden_act"),
    "attention bias": (config(attention_bias=True), "attention_bias"),
    "fp8 weights": (
        config(quantization_config={"quant_method": "fp8", "fmt": "e4m3"}),
        "quantization_config",
    ),
    "AWQ weights": (config(quantization_config={"quant_method": "awq"}), "quantization_config"),
    "dual-chunk attention": (
        config(dual_chunk_attention_config={"chunk_size": 262144}),
        "dual_chunk_attention_config",
    ),
    "another model": (config(model_type="mistral"), "model_type"),
    "config in UTF-16": (write("config.json", "{}".encode("utf-16")), "config.json"),
    "config is a list": (write("config.json", "[]"), "config.json"),
    # weights
    "no LM head": (weights(lambda tensors: tensors.pop("lm_head.weight")), "lm_head.weight"),
    "only .bin": (only_bin, r"pytorch_model\.bin"),
    "one shard without its index": (one_shard, r"model-00001-of-00003\.safetensors"),
    "legacy Megatron": (legacy_megatron, "mp_rank_00"),
    "weights are an LFS pointer": (write("model.safetensors", LFS), r"model\.safetensors"),
    "fp8 tensors": (
        weights(
            lambda tensors: tensors.update(
                {
                    name: tensor.to(torch.float8_e4m3fn)
                    for name, tensor in tensors.items()
                    if "down_proj" in name
                }
            )
        ),
        "F8_E4M3",
    ),
    "other width than config.json says": (config(vocab_size=120), "112.*120"),
    # tokenizer
    "tokenizer loses spaces": (loses_spaces, "gives it back changed.*ids"),
    "tokenizer is an LFS pointer": (write("tokenizer.json", LFS), r"tokenizer\.json"),
    "tokenizer in UTF-16": (write("tokenizer.json", "{}".encode("utf-16")), r"tokenizer\.json"),
    "tokenizer with code": (
        template("", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}),
        "auto_map",
    ),
    # chat template
    "template drops the question": (template("Q: A:"), "template"),
    "template raises": (
        template("{{ raise_exception('enable_thinking must be set') }}"),
        "enable_thinking must be set",
    ),
    "template does not parse": (template("{% for %}"), "template"),
    "no default template": (
        template([{"name": "rag", "template": "{{ messages[0].content }}"}]),
        "rag",
    ),
    # prompts
    "blank prompt": (prompts(QUESTION + '{"prompt": " \\u200b\\n"}\n'), "line 2"),
    "half a surrogate": (prompts(QUESTION + '{"prompt": "1 \\ud800 2"}\n'), "line 2"),
    "an image": (prompts(json.dumps({"prompt": [IMAGE]})), "line 1.*image"),
    "a chat without a template": (
        prompts(
            '{"prompt": [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]}'
        ),
        "apply_chat_template",
    ),
    "prompts in UTF-16": (prompts(QUESTION.encode("utf-16")), "UTF-16"),
    "prompts are an LFS pointer": (prompts(LFS), "LFS"),
    "binary prompts": (prompts(bytes(range(256))), r"prompts\.jsonl"),
    "truncated gzip": (
        prompts(gzip.compress(QUESTION.encode() * 999)[:-20], "prompts.jsonl.gz"),
        r"prompts\.jsonl\.gz",
    ),
    "damaged parquet": (prompts(b"PAR1" + bytes(64), "prompts.parquet"), r"prompts\.parquet"),
    "an empty file": (prompts(""), "no prompts"),
}


@pytest.fixture(params=[(0, 1), (0, 2), (1, 2)], ids=["one rank", "rank 0 of 2", "rank 1 of 2"])
def rank(request, monkeypatch):
    return be_rank(*request.param, monkeypatch)


def be_rank(rank: int, world_size: int, monkeypatch) -> int:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr("megatron_eopd.launch.job_store", lambda *a, **k: pytest.fail("late"))
    return rank


def start(name: str, tmp_path: Path, run_dir: Path, capsys) -> str:
    """What it says on stderr."""
    spoil, _ = BAD[name]
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    options = spoil(model) or []
    capsys.readouterr()  # what transformers says while it saves a model
    tensor_parallel = "parallel.tensor_model_parallel_size=1"
    command = [str(QUICKSTART), f"run_dir={run_dir}", f"student.hf_path={model}", tensor_parallel]
    assert main([*command, *options]) == 1
    return capsys.readouterr().err


def assert_one_message(name: str, errors: str) -> None:
    assert "Traceback" not in errors
    assert errors.startswith("error: ") and errors.count("error:") == 1
    message = errors.removeprefix("error: ").strip()
    assert re.search(BAD[name][1], message, re.DOTALL), message


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_message(name, rank, capsys, tmp_path):
    errors = start(name, tmp_path, tmp_path / "run", capsys)
    if rank:
        assert errors == "", "rank 0 speaks for all"
        return
    assert_one_message(name, errors)
    assert not (tmp_path / "run").exists(), "nothing was begun"


@pytest.mark.parametrize("name", BAD)
def test_so_it_does_on_resume(name, monkeypatch, capsys, tmp_path):
    """And leaves what the run has."""
    be_rank(0, 1, monkeypatch)
    run_dir = tmp_path / "run"
    checkpoint = finish_checkpoint(run_dir, 2)
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    assert_one_message(name, start(name, tmp_path, run_dir, capsys))
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
