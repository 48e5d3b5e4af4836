"""Student and teacher speak of the same tokens, or the run says how they differ."""

import shutil
from pathlib import Path

import pytest

from megatron_eopd import preflight
from megatron_eopd.config import load_config
from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.data.vocabulary import check_same_vocabulary
from megatron_eopd.errors import ConfigError
from tests.real_data import real_data

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples/quickstart/models"


@pytest.fixture(scope="module")
def qwen3():
    return load_tokenizer(real_data("tokenizer_qwen3"), vocab_size=151_936)


@pytest.fixture(scope="module")
def spm_file() -> Path:
    return real_data("tokenizer_spm/tokenizer.model.v1")


def test_a_model_may_have_more_columns_than_its_tokenizer_has_ids(qwen3, spm_file):
    """As Qwen3 does: it can sample such an id, and that must not stop a run."""
    check_same_vocabulary(qwen3, qwen3)
    padded = load_tokenizer(spm_file, vocab_size=32_064)
    check_same_vocabulary(padded, padded)
    for tokenizer in (qwen3, padded):
        word = tokenizer.encode("word")
        last = tokenizer.vocab_size - 1
        assert (
            tokenizer.decode((*word, tokenizer.num_ids, last)) == tokenizer.decode(word) == "word"
        )
        for token_id in (-1, last + 1):
            with pytest.raises(ConfigError, match=f"token id {token_id} is not in 0 to {last}"):
                tokenizer.decode((*word, token_id))


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs the checks before a start of the quick start with overrides."""
    monkeypatch.chdir(ROOT)

    def start(*overrides: str) -> preflight.Inputs:
        config = load_config(
            ROOT / "examples/quickstart/eopd.toml",
            [f"run_dir={tmp_path / 'run'}", "rollout.engine=megatron", *overrides],
        )
        return preflight.check(config, 2)

    return start


def test_a_tokenizer_larger_than_the_model(check, spm_file):
    with pytest.raises(ConfigError, match=r"up to 31999, but vocab_size is 112.*student\.tokeniz"):
        check(f"student.tokenizer={spm_file}")
    with pytest.raises(ConfigError, match=r"up to 31999, but vocab_size is 112.*teacher\.tokeniz"):
        check(f"teacher.tokenizer={spm_file}")


def test_tokenizers_may_stand_apart_from_the_models(check, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "student" / name, tmp_path)
    inputs = check(f"student.tokenizer={tmp_path}", f"teacher.tokenizer={tmp_path}")
    assert inputs.tokenizer.path == tmp_path and inputs.tokenizer.stop_ids == (109,)


def test_stop_ids_of_the_run_settle_a_disagreement(check, tmp_path):
    """A base student ends otherwise than an instructed teacher."""
    teacher = Path(shutil.copytree(MODELS / "teacher", tmp_path / "teacher"))
    (teacher / "generation_config.json").write_text('{"eos_token_id": 107}')
    with pytest.raises(ConfigError, match=r"\(109,\), the teacher with \(107,\).*stop_token_ids"):
        check(f"teacher.hf_path={teacher}")
    inputs = check(f"teacher.hf_path={teacher}", "rollout.stop_token_ids=[109, 107]")
    assert inputs.tokenizer.stop_ids == (109, 107)
    with pytest.raises(ConfigError, match=r"end with id 112, but the ids .* are 0 to 111"):
        check("rollout.stop_token_ids=[112]")
