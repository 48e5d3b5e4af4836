"""Tokenizers that are not what their file says are refused, and such as know little pass."""

import json
import shutil
import time
from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from megatron_eopd.data.probe import PROBE, check_tokenizer
from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.errors import ConfigError
from tests.real_data import real_data
from tests.tiny_tokenizers import byte_level, write

MODELS = Path(__file__).parents[1] / "examples/quickstart/models"


def check(path: Path) -> None:
    check_tokenizer(load_tokenizer(path), "student")


def test_real_tokenizers_pass_in_no_time():
    """Half a second of one processor; the bound allows for a busy one."""
    tokenizer = load_tokenizer(real_data("tokenizer_qwen3"))
    start = time.process_time()
    check_tokenizer(tokenizer, "student")
    assert time.process_time() - start < 2
    check(real_data("tokenizer_spm/tokenizer.model.v1"))


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_tokenizer_of_a_hundred_words_passes(name):
    """It splits at white space, so that runs of it are lost, and knows no byte."""
    check(MODELS / name)


@pytest.mark.parametrize("all_bytes", [True, False])
@pytest.mark.parametrize(
    "name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer"]
)
def test_byte_level_tokenizers_pass(tmp_path, all_bytes, name):
    library = byte_level(all_bytes=all_bytes)
    library.enable_truncation(8)
    library.enable_padding(length=100)
    check(write(tmp_path, library, tokenizer_class=name))


def test_what_transformers_makes_of_a_byte_level_llama_tokenizer_is_refused(tmp_path):
    path = write(tmp_path, tokenizer_class="LlamaTokenizerFast")
    (path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(path)
    tokenizer.library = AutoTokenizer.from_pretrained(path)
    with pytest.raises(ConfigError, match=r"From place \d+ on: \[.*\] as loaded, \[.*\] in token"):
        check_tokenizer(tokenizer, "student")


@pytest.mark.parametrize(
    "option", [{"split_special_tokens": True}, {"extra_special_tokens": ["two  three"]}]
)
def test_a_configuration_that_changes_the_file_s_reading_is_refused(tmp_path, option):
    with pytest.raises(ConfigError, match=r"other ids than the file tokenizer\.json.*student\.tok"):
        check(write(tmp_path, **option))


def strip_spaces(library: tokenizers.Tokenizer) -> None:
    library.normalizer = normalizers.Replace(" ", "")


def squeeze_spaces(library: tokenizers.Tokenizer) -> None:
    library.normalizer = normalizers.Replace(tokenizers.Regex(" +"), " ")


def drop_line_feeds(library: tokenizers.Tokenizer) -> None:
    library.normalizer = normalizers.Replace("\n", " ")


def split_at_white_space(library: tokenizers.Tokenizer) -> None:
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def metaspace(library: tokenizers.Tokenizer) -> None:
    library.pre_tokenizer = pre_tokenizers.Metaspace()


def no_decoder(library: tokenizers.Tokenizer) -> None:
    library.decoder = decoders.Fuse()


LOSSES = [
    strip_spaces,
    squeeze_spaces,
    drop_line_feeds,
    split_at_white_space,
    metaspace,
    no_decoder,
]


@pytest.mark.parametrize("spoil", LOSSES)
def test_a_file_that_loses_parts_of_a_text_is_refused(tmp_path, spoil):
    library = byte_level()
    spoil(library)
    with pytest.raises(ConfigError, match=r"gives it back changed\. From place \d+ on: '.*' as lo"):
        check(write(tmp_path, library))


@pytest.mark.parametrize("spoil", [strip_spaces, split_at_white_space, metaspace, no_decoder])
def test_so_is_one_that_has_not_every_byte_but_spaces(tmp_path, spoil):
    library = byte_level(all_bytes=False)
    spoil(library)
    with pytest.raises(ConfigError, match="gives it back changed"):
        check(write(tmp_path, library))


def test_a_tokenizer_that_composes_accents_passes(tmp_path):
    library = byte_level()
    library.normalizer = normalizers.NFC()
    check(write(tmp_path, library))


def test_a_word_level_tokenizer_that_lowers_case_passes(tmp_path):
    library = tokenizers.Tokenizer(models.WordLevel({"two": 0, "[UNK]": 1}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.normalizer = normalizers.Lowercase()
    check(write(tmp_path, library, bos_token=None, eos_token=None))


def test_a_sentencepiece_model_that_transformers_reads_otherwise_is_refused(tmp_path):
    """Its merges come from the order of ids there, and from the pieces' ranks in the library."""
    model = shutil.copy(real_data("tokenizer_spm/tokenizer.model.v1"), tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    library = SentencePieceProcessor(model_file=str(model))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_response(PROBE) != tuple(library.encode(PROBE))
    with pytest.raises(ConfigError, match=r"than the file tokenizer\.model itself.*From place \d+"):
        check_tokenizer(tokenizer, "student")
