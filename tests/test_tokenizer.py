"""Tokenizers: the ids and texts of their own libraries, and errors that say what to set."""

import base64
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_eopd.data.probe import check_tokenizer
from megatron_eopd.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn
from tests import tiny_tokenizers
from tests.real_data import real_data
from tests.tiny_tokenizers import CHATML, bos_in_front, byte_level, write

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples/quickstart/models"
QWEN3_COLUMNS = 151_936

CORPUS = [
    "",
    " ",
    "\n",
    "\t\t  \r\n \u00a0\u3000x",
    "The quick brown fox jumps over the lazy dog.",
    "  leading, trailing and   inner spaces  ",
    "def f(x: int) -> int:\n\treturn x**2 + 1  # naïve\n\n\n",
    "0 1 12 123 1234567890 3.14159 1,000,000 ½ ²",
    r"Let $x^2 + \frac{1}{2} = \boxed{42}$; don't we'll I'M",
    "中文、日本語、한국어, العربية, עברית, हिन्दी, ไทย",
    "é e\u0301 ﬁ Å Å \u212b",  # composed, decomposed, compatibility
    "🙂👩‍👩‍👧‍👦🇫🇷 \U0001f9d1🏽‍🚀",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think> <|endoftext|>",
    "<s> </s> <unk> <0x0A> [INST] ▁ ▁▁",
    "a\x00b\x07\ufeff\ufffd\u200b",
    "word " * 500,
]
SPECIAL = ("<|", "<think", "</think", "<tool", "</tool")

texts = st.text() | st.text(alphabet=" \n\tab1.,'é🙂中\u0301▁<>|s/")
thorough = settings(deadline=None, max_examples=300)


# Caches for the property tests, which cannot take function-scoped fixtures.
@pytest.fixture(scope="module")
def qwen3():
    return load_tokenizer(real_data("tokenizer_qwen3"), vocab_size=QWEN3_COLUMNS)


@pytest.fixture(scope="module")
def qwen3_library():
    return tokenizers.Tokenizer.from_file(str(real_data("tokenizer_qwen3/tokenizer.json")))


@pytest.fixture(scope="module")
def spm_file() -> Path:
    return real_data("tokenizer_spm/tokenizer.model.v1")


@pytest.fixture(scope="module")
def spm(spm_file):
    return load_tokenizer(spm_file)


@pytest.fixture(scope="module")
def spm_library(spm_file):
    return SentencePieceProcessor(model_file=str(spm_file))


# --- Hugging Face -------------------------------------------------------------------------------


def test_qwen3_encodes_and_decodes_as_transformers_does(qwen3, qwen3_library):
    theirs = AutoTokenizer.from_pretrained(real_data("tokenizer_qwen3"))
    assert (qwen3.bos_id, qwen3.eos_id, qwen3.pad_id) == (None, 151_645, 151_643)
    assert len(qwen3) == qwen3.num_ids == 151_669 and qwen3.stop_ids == (151_645,)
    for text in CORPUS:
        ids = qwen3.encode(text)
        assert list(ids) == theirs.encode(text) == qwen3_library.encode(text).ids
        assert qwen3.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_qwen3_has_the_ids_of_the_tiktoken_ranks(qwen3):
    """The same vocabulary, as another library and another file have it."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    lines = real_data("tokenizer_qwen3/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    theirs = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in CORPUS:
        if any(special in text for special in SPECIAL):
            continue
        # Qwen3's tokenizer composes accents first.
        assert list(qwen3.encode(text)) == theirs.encode(unicodedata.normalize("NFC", text))


@thorough
@given(text=texts)
def test_qwen3_round_trips_up_to_the_composition_of_accents(qwen3, qwen3_library, text):
    ids = qwen3.encode(text)
    assert list(ids) == qwen3_library.encode(text).ids
    assert qwen3.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_chat_template_takes_options_as_in_transformers(qwen3, options):
    theirs = AutoTokenizer.from_pretrained(real_data("tokenizer_qwen3"))
    for text in CORPUS:
        expected = theirs.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=False,
            **options,
        )
        assert list(qwen3.encode_chat([Turn("user", text)], **options)) == expected
    ends_thinking = qwen3.encode_chat([Turn("user", "x")], **options)[-4:] == qwen3.encode(
        "<think>\n\n</think>\n\n"
    )
    assert ends_thinking == (options == {"enable_thinking": False})


@pytest.mark.parametrize("name", ["enable_thinkin", "tokenize", "user_text"])
def test_an_option_that_the_template_does_not_read_is_an_error(qwen3, name):
    """Jinja would ignore it, and transformers has parameters of its own by some such names."""
    with pytest.raises(ConfigError, match=rf"kwargs\.{name}: .* reads .*enable_thinking"):
        qwen3.encode_chat([Turn("user", "x")], **{name: False})


def test_a_variable_with_a_default_in_the_template_counts_as_read(tmp_path):
    model = shutil.copytree(MODELS / "student", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% set style = style | default('5') %}{% if not word is defined %}{% set word = '6' %}"
        "{% endif %}{{ style }} {{ word }} {{ messages[0].content }}"
    )
    tokenizer.save_pretrained(model)
    ours = load_tokenizer(model)
    assert ours.encode_chat([Turn("user", "1")]) == ours.encode("5 6 1")
    assert ours.encode_chat([Turn("user", "1")], style="7", word="8") == ours.encode("7 8 1")
    with pytest.raises(ConfigError, match=r"kwargs\.wrod: .* It reads style, word"):
        ours.encode_chat([Turn("user", "1")], wrod="8")


def test_a_byte_level_tokenizer_keeps_its_spaces_whatever_its_class_is_called(tmp_path):
    """DeepSeek's are so; AutoTokenizer builds a Llama tokenizer from the vocabulary, without."""
    library = byte_level()
    path = write(tmp_path, library, tokenizer_class="LlamaTokenizerFast")
    (path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(path)
    for text in CORPUS:
        assert list(tokenizer.encode(text)) == library.encode(text).ids
        assert tokenizer.show(tokenizer.encode(text)) == text


# --- what stands in front of a prompt -----------------------------------------------------------


@pytest.mark.parametrize("text", ["two", "<bos>two", "<bos><bos>two", "", "<bos>"])
@pytest.mark.parametrize("says", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_a_prompt_begins_with_one_bos_or_none(tmp_path, text, says):
    """As the post-processor of tokenizer.json has it, unless the configuration says otherwise."""
    for library, default in ((byte_level(), False), (bos_in_front(byte_level()), True)):
        tokenizer = load_tokenizer(write(tmp_path, library, **says))
        wants = says.get("add_bos_token", default) or "<bos>" in text
        bare = library.encode(text.replace("<bos>", ""), add_special_tokens=False).ids
        assert list(tokenizer.encode(text)) == [tokenizer.bos_id] * wants + bare
        assert tokenizer.encode_response("two")[0] != tokenizer.bos_id


def test_nothing_stands_behind_a_prompt(tmp_path):
    """Some post-processors put an end of sequence there, for training on whole texts."""
    library = byte_level()
    ids = [(token, library.token_to_id(token)) for token in ("<bos>", "<eos>")]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=ids
    )
    tokenizer = load_tokenizer(write(tmp_path, library))
    assert tokenizer.show(tokenizer.encode("two plus")) == "<bos>two plus"


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
def test_a_chat_has_the_bos_of_its_template_alone(tmp_path, template):
    path = write(tmp_path, bos_in_front(byte_level()), add_bos_token=True, chat_template=template)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode_chat([Turn("user", "two plus")])
    assert ids.count(tokenizer.bos_id) == template.count("bos_token")
    assert tokenizer.encode_chat([Turn("user", "<bos>two plus")]) == ids
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{{ messages[0].content }}")
    bare = tokenizer.with_template(None, file)
    assert bare.show(bare.encode_chat([Turn("user", "<bos>two")])) == "<bos>two"


# --- SentencePiece ------------------------------------------------------------------------------


def test_sentencepiece_encodes_and_decodes_as_its_library_does(spm, spm_library):
    assert (spm.bos_id, spm.eos_id, spm.pad_id) == (1, 2, None)
    assert len(spm) == spm.num_ids == 32_000 and spm.stop_ids == (2,)
    for text in CORPUS:
        ids = spm.encode(text)
        assert list(ids) == spm_library.encode(text)
        assert spm.decode(ids) == spm_library.decode(list(ids))
    assert spm.decode((1, *spm.encode("Hello"), 2)) == "Hello"


@thorough
@given(text=texts)
def test_sentencepiece_round_trips_but_for_its_own_space_sign(spm, spm_library, text):
    ids = spm.encode(text)
    assert list(ids) == spm_library.encode(text)
    assert spm.decode(ids) == text.replace("▁", " ")


def test_sentencepiece_has_no_chat_template(spm):
    with pytest.raises(ConfigError, match=r"Set data\.apply_chat_template=false, or stud"):
        spm.encode_chat([Turn("user", "x")])


# --- which one, and with which ids --------------------------------------------------------------


def test_a_file_is_sentencepiece_and_a_directory_is_what_it_holds(spm_file, tmp_path):
    shutil.copy(spm_file, tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 28705]}')
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.stop_ids == (2, 28705)
    shutil.copy(MODELS / "student/tokenizer.json", tmp_path)
    shutil.copy(MODELS / "student/tokenizer_config.json", tmp_path)
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


def test_equal_vocabularies_are_recognised_whatever_holds_them(spm, spm_file, tmp_path):
    assert load_tokenizer(shutil.copy(spm_file, tmp_path)).digest == spm.digest
    student, teacher = (load_tokenizer(MODELS / name) for name in ("student", "teacher"))
    assert student.digest == teacher.digest != spm.digest


def test_given_stop_ids_come_before_all_others():
    assert load_tokenizer(MODELS / "student").stop_ids == (109,)
    assert load_tokenizer(MODELS / "student", stop_ids=(3, 4)).stop_ids == (3, 4)


def test_the_model_s_own_ends_stay_known_beside_those_given(tmp_path):
    path = write(tmp_path)
    (path / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    tokenizer = load_tokenizer(path, stop_ids=[2])
    assert tokenizer.stop_ids == (2,) and tokenizer.own_stop_ids == (3, 1)
    (path / "config.json").write_text('{"eos_token_id": 2}')
    for nothing in ("[]", "null"):
        (path / "generation_config.json").write_text(f'{{"eos_token_id": {nothing}}}')
        assert load_tokenizer(path).stop_ids == (2,)
    for wrong in ('"<eos>"', '["<eos>"]', "true", "1.0"):
        (path / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id=.* neither"):
            load_tokenizer(path).stop_ids  # noqa: B018, reading it is what is tested


# --- special tokens -----------------------------------------------------------------------------


def as_object(token: str, **more) -> dict:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token} | flags | more


KEYS = ("additional_special_tokens", "extra_special_tokens")


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("more", [{}, {"__type": "AddedToken"}])
def test_tokens_without_a_role_may_be_objects(tmp_path, in_config, key, more):
    """As transformers 4 wrote them; in either file, and beside texts in the other."""
    objects = {key: [as_object("<|im_start|>", **more), "<|im_end|>"]}
    path = write(tmp_path, **(objects if in_config else {KEYS[0]: ["<bos>"]}))
    if not in_config:
        (path / "special_tokens_map.json").write_text(json.dumps(objects))
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, "student")
    assert tokenizer.special_tokens() == {t: i for i, t in enumerate(tiny_tokenizers.SPECIAL)}
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.library.extra_special_tokens)


@pytest.mark.parametrize("tokens", [[{"x": 1}], [5, as_object("<bos>")], [None]])
def test_tokens_that_are_neither_are_refused(tmp_path, tokens):
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(write(tmp_path, extra_special_tokens=tokens))


# --- errors -------------------------------------------------------------------------------------


def test_what_is_no_tokenizer_is_named(spm_file, tmp_path):
    with pytest.raises(ConfigError, match=r"/nowhere: no such file or directory"):
        load_tokenizer(Path("/nowhere"))
    with pytest.raises(ConfigError, match=r"no tokenizer there, neither tokenizer\.json nor"):
        load_tokenizer(tmp_path)
    # Without tokenizer.json a chat would be special tokens and nothing between them.
    shutil.copy(real_data("tokenizer_qwen3/tokenizer_config.json"), tmp_path)
    with pytest.raises(ConfigError, match=r"special tokens only. Copy tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    for content in (b"text", spm_file.read_bytes()[:-1000]):
        path = tmp_path / "broken.model"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken\.model: not a SentencePiece model"):
            load_tokenizer(path)


def test_a_tokenizer_without_an_end_of_sequence(tmp_path):
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    for name in ("generation_config.json", "config.json"):
        (model / name).unlink()
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    with pytest.raises(ConfigError, match=r"no end-of-sequence id.*Set rollout\.stop_token_ids"):
        load_tokenizer(model).stop_ids  # noqa: B018, reading it is what is tested
    assert load_tokenizer(model, stop_ids=(5,)).stop_ids == (5,)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11422654\n"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "tokenizer.model"]
)
@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty"), (b" \n", "is empty"), (POINTER, "git lfs pull")]
)
def test_files_that_stand_for_others_are_named(tmp_path, name, content, said):
    path = write(tmp_path)
    (path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}: .*{said}"):
        load_tokenizer(path).stop_ids  # noqa: B018, generation_config.json is read then


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": "ü"}'.encode("utf-16"), "byte order mark"),
        ('{"a": "ü"}'.encode("utf-8-sig"), "byte order mark"),
        ('{"a": "ü"}'.encode("latin-1"), "not UTF-8"),
        (b'{"a": 1', "not valid JSON .*line 1"),
        (b"[1]", "expected a JSON object"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_configurations_are_named(tmp_path, name, content, said):
    path = write(tmp_path)
    (path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}: .*{said}"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [b'{"version"', b"{}", '{"ü": 1}'.encode("utf-16"), b"[]"])
def test_a_damaged_tokenizer_file_is_named(tmp_path, content):
    path = write(tmp_path)
    (path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: "):
        load_tokenizer(path)


def joined(tokenizer, ids) -> bytes:
    return b"".join(tokenizer.piece(i)[0] for i in ids)


@pytest.mark.parametrize("text", CORPUS)
def test_pieces_of_a_byte_level_tokenizer_join_to_the_text(qwen3, text):
    """Whatever characters they cut; special tokens are spelled, and marked."""
    ids = qwen3.encode_response(text)
    assert joined(qwen3, ids) == unicodedata.normalize("NFC", text).encode()
    special = {text for text, i in qwen3.special_tokens().items() if i in ids}
    assert {qwen3.piece(i)[0].decode() for i in ids if qwen3.piece(i)[1]} == special


def test_pieces_of_sentencepiece_join_to_the_text(spm, tmp_path):
    for text in ("one two", "中文 🙂"):
        assert joined(spm, spm.encode_response(text)).decode().strip() == text
    assert [spm.piece(i)[1] for i in (spm.eos_id, spm.encode("a")[0])] == [True, False]
    # The same spelling in a tokenizer.json, as Llama 2 has it.
    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": 2, "<0xE4>": 3, "▁a": 4, "b": 5}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    library.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
    )
    tokenizer = load_tokenizer(write(tmp_path / "llama", library))
    assert joined(tokenizer, (4, 5, 3)) == b" ab\xe4"


def test_a_piece_of_no_token_is_marked():
    """Padded columns of the model, and what it has no column for; words without a decoder have a
    space between them, as their texts do."""
    toy = load_tokenizer(MODELS / "student")
    assert toy.piece(toy.num_ids) == (f"<id {toy.num_ids}>".encode(), True)
    ids = toy.encode_response("3 5 -> 8")
    assert joined(toy, ids).decode().strip() == toy.decode(ids) == "3 5 -> 8"
