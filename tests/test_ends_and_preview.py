"""What people are told of a tokenizer at start: how answers end, and what a prompt looks like."""

from collections.abc import Sequence

import pytest

from megatron_eopd.data.ends import end_of_turn_warnings, stop_id_warnings
from megatron_eopd.data.preview import render_preview, show_white_space
from megatron_eopd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_eopd.records import Turn
from tests.real_data import real_data
from tests.tiny_tokenizers import CHATML, SPECIAL, write

BOS, EOS, IM_START, IM_END = range(len(SPECIAL))
"""The ids that `write` gives SPECIAL."""


@pytest.fixture
def load(tmp_path):
    """A ChatML tokenizer whose model's files name these ids as ends."""

    def make(
        name: str, own: list[int], given: Sequence[int] = (), template: str = CHATML
    ) -> Tokenizer:
        path = write(tmp_path / name, chat_template=template)
        (path / "generation_config.json").write_text(f'{{"eos_token_id": {own}}}')
        return load_tokenizer(path, stop_ids=given)

    return make


# --- how answers end ----------------------------------------------------------------------------


def test_the_ids_of_the_special_tokens(load):
    ids = [load("student", [EOS]).token_id(token) for token in SPECIAL]
    assert ids == [BOS, EOS, IM_START, IM_END]


def test_a_template_that_ends_turns_otherwise_than_responses_end_is_told(load):
    """As with two base models, which agree with each other."""
    (told,) = end_of_turn_warnings(load("student", [EOS]))
    assert "ends an answer with 3 <|im_end|>, and a response ends with 1 <eos> alone" in told
    assert "Set rollout.stop_token_ids=[1, 3]." in told
    assert end_of_turn_warnings(load("student", [EOS, IM_END])) == []
    assert end_of_turn_warnings(load("student", [EOS], [IM_END])) == []


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",  # what comes then is the model's
        "{% for m in messages %}{{ m.content | trim }}\n {% endfor %}",
        "{% for m in messages %}{{ m.content }} <|im_end|><eos>{% endfor %}",
    ],
)
def test_a_template_that_ends_turns_as_responses_end_is_not(load, template):
    assert end_of_turn_warnings(load("student", [EOS], template=template)) == []


def test_an_end_that_is_no_token_is_told(load):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n### {% endfor %}"
    (told,) = end_of_turn_warnings(load("student", [EOS], template=template))
    assert "'###'" in told and "no token of its own" in told


USER_LAST = "{% if messages[-1].role != 'user' %}{{ raise_exception('user last') }}{% endif %}"


def test_a_template_that_wants_a_question_last_is_asked_between_two(load):
    each = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    assert end_of_turn_warnings(load("student", [EOS], template=USER_LAST + each)) == []
    (told,) = end_of_turn_warnings(load("student", [EOS], template=USER_LAST + CHATML))
    assert "ends an answer with 3 <|im_end|>" in told and "kwargs" not in told


def test_options_of_the_template_count_and_its_refusal_is_told(load):
    template = "{% if not x %}{{ raise_exception('x!') }}{% endif %}" + CHATML
    student = load("student", [IM_END], template=template)
    assert end_of_turn_warnings(student, x=1) == []
    (told,) = end_of_turn_warnings(student)
    assert "is not known: " in told and "x!" in told


def test_qwen3_ends_its_turns_with_what_ends_its_answers():
    path = real_data("tokenizer_qwen3")
    for options in ({}, {"enable_thinking": False}):
        assert end_of_turn_warnings(load_tokenizer(path), **options) == []
    (told,) = end_of_turn_warnings(load_tokenizer(path, stop_ids=[151643]))
    assert "151645 <|im_end|>" in told and "[151643, 151645]" in told


def test_given_ends_that_the_teacher_does_not_write_are_told(load):
    given = [EOS, IM_END]
    told = stop_id_warnings(load("student", [EOS], given), load("teacher", [IM_END], given))
    assert len(told) == 1 and "may end with 1 <eos>" in told[0] and "with 3 <|im_end|>" in told[0]
    assert "set teacher.eos_token_map" in told[0]


def test_own_ends_that_end_no_response_are_told(load):
    told = stop_id_warnings(
        load("student", [EOS], [IM_END]), load("teacher", [IM_END, BOS], [IM_END]), "teachers.b"
    )
    assert len(told) == 2
    assert "the student" in told[0] and "[3, 1]" in told[0]
    assert "the teachers.b" in told[1] and "[3, 0]" in told[1]


def test_models_that_end_alike_say_nothing(load):
    assert stop_id_warnings(load("student", [EOS, IM_END]), load("teacher", [EOS, IM_END])) == []


# --- preview ------------------------------------------------------------------------------------


def test_a_preview_shows_all_that_the_model_reads(load):
    student = load("student", [EOS, IM_END])
    student.vocab_size = 400
    ids = (*student.encode_chat([Turn("user", "two  \n plus\ttwo")]), 390)
    assert render_preview(student, ids, "student").split("\n") == [
        f"what the student reads, {len(ids)} tokens by {student.path}:",
        "  | <|im_start|>user↵",
        "  | two··↵",
        "  | ·plus→two<|im_end|>↵",
        "  | <|im_start|>assistant↵",
        "  | <id 390>",
        f"  ids: {' '.join(map(str, ids))}",
        "  an answer ends with: 1 <eos>, 3 <|im_end|>",
    ]


def test_a_preview_leaves_out_the_middle_of_many_ids(load):
    student = load("student", [EOS])
    ids = range(64)
    assert f"ids: {' '.join(map(str, ids))}\n" in render_preview(student, ids)
    shown = render_preview(student, range(100))
    assert "  ids: 0 1 " in shown and " 39 … 44 more … 84 " in shown and " 99\n" in shown


def test_a_preview_of_sentencepiece_shows_its_control_tokens():
    tokenizer = load_tokenizer(real_data("tokenizer_spm/tokenizer.model.v1"))
    shown = render_preview(tokenizer, (1, *tokenizer.encode("What is it?"), 2), "teacher")
    assert "what the teacher reads, 6 tokens" in shown and "\n  | <s>What is it?</s>\n" in shown
    assert shown.endswith("ends with: 2 </s>")


def test_characters_that_show_nothing_are_written_out():
    assert show_white_space("a b\u00a0c\u200bd\x00e\r\n") == "a b\\xa0c\\u200bd\\x00e\\r↵\n"


def test_decoding_drops_what_a_preview_shows(load):
    student = load("student", [EOS])
    ids = student.encode_chat([Turn("user", "two")])
    assert (
        student.decode(ids)
        == "user\ntwo\nassistant\n"
        == student.show(ids).replace("<|im_start|>", "").replace("<|im_end|>", "")
    )
