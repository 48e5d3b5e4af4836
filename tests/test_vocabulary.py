"""Student and teacher speak of the same tokens, or the run says how they differ."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_eopd import preflight
from megatron_eopd.config import load_config
from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.data.vocabulary import shared_vocab_size
from megatron_eopd.errors import ConfigError
from tests.real_data import real_data
from tests.tiny_models import make_model

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples/quickstart/models"


@pytest.fixture(scope="module")
def qwen3():
    return load_tokenizer(real_data("tokenizer_qwen3"), vocab_size=151_936)


@pytest.fixture(scope="module")
def spm_file() -> Path:
    return real_data("tokenizer_spm/tokenizer.model.v1")


def test_a_model_may_have_more_columns_than_its_tokenizer_has_ids(qwen3, spm_file):
    """As Qwen3 does: they are padding, also where an answer that somebody else wrote has one."""
    padded = load_tokenizer(spm_file, vocab_size=32_064)
    for tokenizer, size in ((qwen3, 151_669), (padded, 32_000)):
        assert shared_vocab_size(tokenizer, tokenizer) == size
        word = tokenizer.encode("word")
        last = tokenizer.vocab_size - 1
        assert (
            tokenizer.decode((*word, tokenizer.num_ids, last)) == tokenizer.decode(word) == "word"
        )
        for token_id in (-1, last + 1):
            with pytest.raises(ConfigError, match=f"token id {token_id} is not in 0 to {last}"):
                tokenizer.decode((*word, token_id))


def test_widths_of_one_tokenizer_may_differ(spm_file):
    """Qwen2.5 has 151,936 columns up to 3B and 152,064 from 7B on."""
    student, teacher = (load_tokenizer(spm_file, vocab_size=n) for n in (32_000, 32_128))
    assert shared_vocab_size(student, teacher) == shared_vocab_size(teacher, student) == 32_000


@pytest.fixture
def extended(tmp_path) -> Path:
    """The quick start's teacher with three more tokens, of 112, and columns for them."""
    path = Path(shutil.copytree(MODELS / "teacher", tmp_path / "extended"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(path)
    make_model("qwen3", path, vocab_size=128)
    return path


def test_a_tokenizer_that_extends_the_other_needs_an_option(check, extended):
    with pytest.raises(
        ConfigError,
        match=r"112 tokens\).*115 tokens\) share their first 112 ids.*3 more: <tool_call>, "
        r"</tool_call>, <think>\. Set objective\.exclude_unshared_tokens=true",
    ):
        check(f"teacher.hf_path={extended}")
    exclude = "objective.exclude_unshared_tokens=true"
    assert check(f"teacher.hf_path={extended}", exclude).tokenizers.vocab_size == 112
    # The other way round: the student's own tokens are left out.
    teacher = MODELS / "teacher"
    assert check(
        f"student.hf_path={extended}", f"teacher.hf_path={teacher}", exclude
    ).tokenizers.vocab_size


def test_a_prompt_with_a_token_that_only_the_student_has(check, extended, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 2"}\n{"prompt": "3 <think> 4"}\n')
    options = (f"student.hf_path={extended}", f"data.prompts={prompts}", "evaluation.tasks=none")
    with pytest.raises(
        ConfigError, match=r"prompt 1, '3 <think> 4': '<think>' \(id 114\) is none of the 112"
    ):
        check(*options, "objective.exclude_unshared_tokens=true")


def test_a_reference_answer_with_a_token_that_only_the_student_has(check, extended, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 2", "response": ["3 4", "3 <think> 4"]}\n')
    options = (f"student.hf_path={extended}", f"data.prompts={prompts}", "evaluation.tasks=none")
    references = ("data.response_key=response", "rollout.reference_fraction=1")
    with pytest.raises(ConfigError, match=r"prompt 0, '1 2': '<think>' \(id 114\) is none of the"):
        check(*options, *references, "objective.exclude_unshared_tokens=true")


def test_an_end_that_only_the_student_has(check, extended):
    with pytest.raises(ConfigError, match=r"id 114 ends a response and is none of the 112 tokens"):
        check(
            f"student.hf_path={extended}",
            "rollout.stop_token_ids=[114]",
            'teacher.eos_token_map={"<think>" = "<eos>"}',
            "objective.exclude_unshared_tokens=true",
        )


def test_other_tokens_at_the_same_ids_are_shown(check, tmp_path):
    """Whatever the option says: the loss would compare "+" with "plus"."""
    other = Path(shutil.copytree(MODELS / "teacher", tmp_path / "other"))
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"+": 100', '"plus": 100'))
    with pytest.raises(ConfigError, match=r"100 is '\+' to the student and 'plus' to the teacher"):
        check(f"teacher.hf_path={other}", "objective.exclude_unshared_tokens=true")


@pytest.mark.parametrize("exclude", [[], ["objective.exclude_unshared_tokens=true"]])
def test_special_tokens_of_other_names_have_a_way_out(check, tmp_path, exclude):
    """Reserved ones that somebody gave names: the ids may be those of training all the same."""
    other = Path(shutil.copytree(MODELS / "teacher", tmp_path / "other"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = other / name
        file.write_text(file.read_text().replace("<pad>", "<mine>"))
    with pytest.raises(ConfigError, match=r"1 of 112: 107 is '<pad>' .*All of these are special"):
        check(f"teacher.hf_path={other}", *exclude)
    student = f"teacher.tokenizer={MODELS / 'student'}"
    assert check(f"teacher.hf_path={other}", student, *exclude).tokenizers.vocab_size == 112
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"+": 100', '"plus": 100'))
    with pytest.raises(ConfigError, match=r"2 of 112: 100 .*Use models that share") as told:
        check(f"teacher.hf_path={other}", *exclude)
    assert "teacher.tokenizer" not in str(told.value)


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
    assert inputs.tokenizers.student.path == tmp_path and inputs.tokenizers.student.stop_ids == (
        109,
    )


def test_stop_ids_of_the_run_settle_a_disagreement(check, tmp_path):
    """A base student ends otherwise than an instructed teacher."""
    teacher = Path(shutil.copytree(MODELS / "teacher", tmp_path / "teacher"))
    (teacher / "generation_config.json").write_text('{"eos_token_id": 107}')
    with pytest.raises(ConfigError, match=r"\(109,\), the teacher with \(107,\).*stop_token_ids"):
        check(f"teacher.hf_path={teacher}")
    inputs = check(f"teacher.hf_path={teacher}", "rollout.stop_token_ids=[109, 107]")
    assert inputs.tokenizers.student.stop_ids == (109, 107)
    with pytest.raises(ConfigError, match=r"end with id 112, but the ids .* are 0 to 111"):
        check("rollout.stop_token_ids=[112]")
