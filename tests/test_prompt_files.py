"""Prompt files of every form, in training and evaluation: what the model is shown of each line."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from megatron_eopd.config import DataConfig, load_config
from megatron_eopd.data.prompt_files import places
from megatron_eopd.data.prompts import PromptSet, load_prompts
from megatron_eopd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.problems import load_problem_sets
from megatron_eopd.records import Prompt
from tests.test_preflight import MODELS, QUICKSTART

PLAIN = "3 5 7 8 -> 24 :"
USER = {"role": "user", "content": PLAIN}
SYSTEM = {"role": "system", "content": "9"}
CHAT = [SYSTEM, {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, USER]
ANSWER = {"role": "assistant", "content": "5"}
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 10, 'user': 11, 'assistant': 12}[m.role] }} "
    "{{ m.content }} ; {% endfor %}{% if add_generation_prompt %}12{% endif %}"
)
"""Roles are numbers here: the tokenizer of the toy models knows no words."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("chat")
    library = AutoTokenizer.from_pretrained(MODELS / "student")
    library.chat_template = TEMPLATE
    library.save_pretrained(path)
    return load_tokenizer(path, model_path=MODELS / "student")


@pytest.fixture
def load(tmp_path, tokenizer):
    """Writes the rows as a prompt file, and loads it."""
    path = tmp_path / "prompts.jsonl"

    def load(*rows, write=None, **options) -> PromptSet:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines))
        if write is not None:
            write(path, rows)
        data = DataConfig(prompts=str(path), shuffle=False, **options)
        return load_prompts(data, tokenizer, seed=1)

    return load


def shown(prompt: Prompt, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(prompt.prompt_ids)


def as_gzip(path: Path, rows) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def as_array(path: Path, rows) -> None:
    path.write_text(json.dumps(rows))


def as_parquet(path: Path, rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


# --- one question -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PLAIN},
        {"prompt": [USER]},
        {"prompt": json.dumps([USER])},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": PLAIN}]}]},
        {"prompt": [USER, ANSWER]},
        {"messages": [USER]},
        {"conversations": [{"from": "human", "value": PLAIN}, {"from": "gpt", "value": "5"}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("write", [None, as_gzip, as_array, as_parquet])
def test_a_question_is_the_same_in_every_form(load, tokenizer, row, template, write):
    """What graders see, what the model sees, and what a resumed run compares."""
    prompts = load(row | {"answer": "a"}, write=write, apply_chat_template=template)
    assert (prompts[0].text, prompts[0].answer) == (PLAIN, "a")
    expected = f"11 {PLAIN} ; 12" if template else PLAIN
    assert prompts[0].prompt_ids == tokenizer.encode(expected)
    assert prompts.digest == PromptSet([Prompt(0, PLAIN, "a", ())], 1, False).digest


def test_json_that_is_no_chat_stays_the_prompt(load):
    prompts = load({"prompt": "[ 1 , 2 ]"}, {"prompt": '[{"a": 1}]'})
    assert [p.text for p in (prompts[0], prompts[1])] == ["[ 1 , 2 ]", '[{"a": 1}]']


def test_the_key_is_the_first_that_the_first_line_has_or_the_given_one(load):
    rows = {"messages": [USER], "conversations": [USER | {"content": "2"}], "text": "3"}
    assert load(rows)[0].text == PLAIN
    assert load(rows | {"prompt": "1"})[0].text == "1"
    assert load(rows, prompt_key="text")[0].text == "3"
    assert load(rows, prompt_key="conversations")[0].text == "2"
    # It is one for all lines.
    with pytest.raises(ConfigError, match=r"line 2: expected a key prompt, and there are mess"):
        load({"prompt": "1"}, {"messages": [USER]})
    with pytest.raises(ConfigError, match=r"line 1: expected a key text,.* are question, answer"):
        load({"question": "1", "answer": "2"}, prompt_key="text")
    with pytest.raises(ConfigError, match="line 1: expected a key prompt or messages or conv"):
        load({"question": "1"})


def test_the_key_is_one_with_a_value(load):
    """As in a table that was put together of several."""
    chat = [{"role": "user", "content": "7"}]
    for empty in (None, "", []):
        assert load({"prompt": empty, "messages": chat})[0].text == "7"
    with pytest.raises(ConfigError, match="prompt is null"):
        load({"prompt": None, "messages": None})


@pytest.mark.parametrize("row", [[USER], USER], ids=["lists", "messages"])
def test_lines_that_are_messages_are_told_what_to_be(load, row):
    with pytest.raises(ConfigError, match=r'1: a message, .* Write \{"messages": \[\.\.\.\]\}'):
        load(row, row)


# --- what a person should look at ---------------------------------------------------------------


def test_special_tokens_that_a_prompt_spells_out_are_told(load):
    """They become tokens of control, as with vLLM and transformers; told once for all."""
    chat = [{"role": "user", "content": "1 <eos>"}, ANSWER, USER]
    rows = {"prompt": "1"}, {"prompt": "2 <pad> 3"}, {"prompt": chat}, {"prompt": "<bos> 5"}
    (told,) = load(*rows, apply_chat_template=True).warnings
    assert "2 prompts hold special tokens" in told and "jsonl line 2, which has <pad>" in told
    assert load(*rows[:1], {"prompt": "1 < pad > eos"}).warnings == []


DATED = TEMPLATE + "{{ strftime_now('%d') | int }}"
WITH_A_DATE = TEMPLATE + (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
    "{{ date_string }}"
)
UNUSED = "{% set today = strftime_now('%d') %}" + TEMPLATE


def test_a_template_that_writes_the_day_is_told(load, tmp_path):
    """A run that goes on tomorrow would ask other questions."""
    file = tmp_path / "template.jinja"

    def told(text: str, **options) -> list[str]:
        file.write_text(text)
        options |= {"apply_chat_template": True, "chat_template_file": file}
        return load({"prompt": PLAIN}, **options).warnings

    assert told(TEMPLATE) == told(UNUSED) == []
    (said,) = told(WITH_A_DATE)
    assert "writes the day" in said and "Set data.chat_template_kwargs.date_string" in said
    assert told(WITH_A_DATE, chat_template_kwargs={"date_string": "26"}) == []
    (said,) = told(DATED)
    assert "writes the day" in said and "data.chat_template_file" in said
    assert "date_string" not in said


# --- chats --------------------------------------------------------------------------------------


def test_the_whole_chat_is_rendered_and_its_last_question_graded(load, tokenizer):
    prompts = load({"prompt": [*CHAT, ANSWER]}, apply_chat_template=True, prompt_suffix=" 7")
    assert prompts[0].text == f"{PLAIN} 7"
    assert shown(prompts[0], tokenizer) == f"10 9 ; 11 1 ; 12 2 ; 11 {PLAIN} 7 ; 12"


def test_what_was_cut_behind_a_question_is_counted(load):
    rows = [{"prompt": p} for p in ([*CHAT, ANSWER], CHAT, [USER, ANSWER, ANSWER], PLAIN)]
    assert load(*rows, apply_chat_template=True).num_cut == 2
    assert load(rows[-1]).num_cut == 0


def test_every_turn_belongs_to_the_digest(load):
    """A run cannot be continued on chats that differ anywhere before the question's end."""

    def digest(*chats, **options) -> str:
        return load(*({"prompt": c} for c in chats), apply_chat_template=True, **options).digest

    chats = [[*CHAT[:n], CHAT[n] | {"content": "8"}, *CHAT[n + 1 :]] for n in range(len(CHAT))]
    chats += [CHAT, CHAT[1:], CHAT[3:], [SYSTEM | {"role": "user"}, *CHAT[1:]]]
    assert len({digest(chat) for chat in chats}) == len(chats)
    assert digest(CHAT) == digest([*CHAT, ANSWER])
    # Where a turn stands counts as well, and one that comes from an option is like another.
    assert digest(CHAT, [USER]) != digest([USER], CHAT)
    assert digest([USER], system_prompt="9") == digest([SYSTEM, USER]) != digest([USER])


def test_the_digest_of_plain_prompts_is_what_it_was():
    """Runs from before there were chats go on: the SHA-256 of the JSON of all."""
    plain = [Prompt(0, "a", "1", (1,)), Prompt(1, "é\u2028", "", (1,), "other")]
    prompts = PromptSet(plain, 1, True)
    assert prompts.digest == sha256('[["a", "1"], ["\\u00e9\\u2028", "", "other"]]')
    references = [((1, 2), (3,)), ((4,),)]
    prompts = PromptSet(plain, 1, True, references)
    assert prompts.references_digest == sha256("[[[1, 2], [3]], [[4]]]")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_system_prompt_stands_before_every_question(load, tokenizer):
    rows = {"prompt": PLAIN}, {"prompt": CHAT[1:]}
    prompts = load(*rows, apply_chat_template=True, system_prompt="6")
    assert shown(prompts[0], tokenizer) == f"10 6 ; 11 {PLAIN} ; 12"
    assert shown(prompts[1], tokenizer) == f"10 6 ; 11 1 ; 12 2 ; 11 {PLAIN} ; 12"
    empty = load(rows[0], apply_chat_template=True, system_prompt="")
    assert shown(empty[0], tokenizer) == f"10 ; 11 {PLAIN} ; 12"
    with pytest.raises(ConfigError, match=r"line 2: has a system turn, and data\.system_"):
        load(*rows[:1], {"prompt": CHAT}, apply_chat_template=True, system_prompt="6")


def test_a_system_turn_beside_the_chat_is_not_lost(load):
    """As LLaMA-Factory writes it."""
    beside = {"conversations": [{"from": "human", "value": "7"}], "system": "Be brief."}
    with pytest.raises(ConfigError, match=r"line 1: the column 'system' beside the chat.*'Be br"):
        load(beside, apply_chat_template=True)
    for row in (
        beside | {"system": ""},
        beside | {"system": None},
        beside | {"conversations": CHAT},
        {"prompt": "a question", "system": "linear"},  # no chat: other columns say other things
    ):
        assert load(row, apply_chat_template=True)


def test_a_chat_needs_a_template(load):
    for chat, roles in ((CHAT[:1] + CHAT[3:], "system, user"), (CHAT[1:], "user, assistant, user")):
        with pytest.raises(ConfigError, match=rf"line 2: a chat \({roles}\), which only"):
            load({"prompt": PLAIN}, {"prompt": chat})


def test_another_template_is_used_and_told_with_the_line(load, tokenizer, tmp_path):
    file = tmp_path / "other.jinja"
    file.write_text("{% for m in messages %}8 {{ m.content }} {% endfor %}")
    prompts = load({"prompt": CHAT}, apply_chat_template=True, chat_template_file=file)
    assert shown(prompts[0], tokenizer) == f"8 9 8 1 8 2 8 {PLAIN}"
    file.write_text("{% if messages|length > 1 %}{{ raise_exception('too long') }}{% endif %}1")
    with pytest.raises(ConfigError, match=r"line 1: .*too long"):
        load({"prompt": CHAT}, apply_chat_template=True, chat_template_file=file)
    with pytest.raises(ConfigError, match="absent: no such file"):
        load({"prompt": "1"}, apply_chat_template=True, chat_template_file=tmp_path / "absent")
    with pytest.raises(ConfigError, match="chat_template_name=rag"):
        load({"prompt": "1"}, apply_chat_template=True, chat_template_name="rag")


# --- lines that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    "row,problem",
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n\u3000"}, "the prompt is empty"),
        ({"prompt": "\u200b\ufeff"}, "the prompt is empty"),
        ({"prompt": [USER | {"content": ""}]}, "the prompt is empty"),
        ({"prompt": json.dumps([USER | {"content": None}])}, "the prompt is empty"),
        (
            {"prompt": [*CHAT[:2], ANSWER | {"content": " "}, USER]},
            r"turn 3 \(assistant\) is empty",
        ),
        ({"prompt": None}, "prompt is null"),
        ({"prompt": 5}, "key prompt: neither text nor chat messages"),
        ({"prompt": float("nan")}, "key prompt: neither text nor chat messages"),
        ({"prompt": []}, "key prompt: a chat without a turn of the user"),
        ({"prompt": [ANSWER]}, "key prompt: a chat without a turn of the user"),
        ({"prompt": [USER | {"content": [{"type": "image"}]}]}, "a part of type image"),
        ({"prompt": "a \ud800"}, "prompt is not valid Unicode"),
        ({"prompt": [SYSTEM | {"content": "\udfff"}, USER]}, "prompt is not valid Unicode"),
        ({"prompt": "1", "answer": "\ud800"}, "answer is not valid Unicode"),
        ('{"prompt": "1", "prompt": "2"}', "the key 'prompt' stands twice"),
        ("[1]", "expected a JSON object"),
    ],
    ids=str,
)
def test_a_line_that_cannot_be_used_is_named(load, tmp_path, row, problem):
    with pytest.raises(ConfigError, match=rf"prompts.jsonl line 3.*{problem}"):
        load({"prompt": "1"}, {"prompt": "2"}, row, apply_chat_template=True, prompt_suffix=" 7")


def test_rows_of_parquet_are_named(load):
    with pytest.raises(ConfigError, match=r"prompts.jsonl row 2: prompt is null"):
        load({"prompt": "1"}, {"prompt": None}, write=as_parquet)


def test_what_parquet_has_where_nothing_is(load):
    """A column is in every row: null where a line would have no key, NaN for a number."""
    rows = {"prompt": "1", "answer": 2.5, "teacher": None}, {"prompt": "2", "answer": None}
    prompts = load(*rows, write=lambda path, rows: as_parquet(path, [*rows]))
    assert [prompts[n].answer for n in (0, 1)] == ["2.5", ""]
    assert load({"prompt": "1", "answer": float("nan")})[0].answer == ""


def test_files_without_prompts(load, tokenizer, tmp_path):
    for content in (b"", b"\n", b"[]", gzip.compress(b"")):
        with pytest.raises(ConfigError, match=r"prompts.jsonl: no prompts in it"):
            load(write=lambda path, rows, content=content: path.write_bytes(content))
    with pytest.raises(ConfigError, match=r"a directory. Name one of its files: prompts"):
        load_prompts(DataConfig(prompts=str(tmp_path)), tokenizer, 1)


def test_prompts_share_the_objects_of_their_ids(load, tokenizer, monkeypatch):
    """A million prompts would else take four times the memory."""
    monkeypatch.setattr(tokenizer, "num_ids", 1001)
    monkeypatch.setattr(tokenizer, "encode", lambda text: (int("1000"), int("1000")))
    first, second = load({"prompt": "1"}, {"prompt": "2"}).batch(0, 2)
    assert first.prompt_ids == second.prompt_ids == (1000, 1000)
    assert len({*map(id, first.prompt_ids + second.prompt_ids)}) == 1


# --- evaluation and options ---------------------------------------------------------------------


@pytest.mark.parametrize("write", [None, as_gzip, as_array, as_parquet])
def test_held_out_problems_have_the_same_forms(tokenizer, tmp_path, write):
    path = tmp_path / "test.jsonl"
    rows = [{"messages": [*CHAT, ANSWER], "answer": "5"}, {"messages": [USER], "answer": "6"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if write is not None:
        write(path, rows)
    options = [f"evaluation.tasks=math={path}"]
    config = load_config(QUICKSTART, [*options, "data.apply_chat_template=true"])
    ((first, second),) = (found.prompts for found in load_problem_sets(config, tokenizer))
    assert shown(first, tokenizer) == f"10 9 ; 11 1 ; 12 2 ; 11 {PLAIN} ; 12"
    assert (first.text, second.text, second.answer) == (PLAIN, PLAIN, "6")
    with pytest.raises(ConfigError, match=r"test.jsonl (line|row) 1: a chat"):
        load_problem_sets(load_config(QUICKSTART, options), tokenizer)


def test_places_are_runs_of_lines_or_rows():
    assert places([f"a line b.jsonl line {n}" for n in (3, 7, 8, 9)]) == (
        "a line b.jsonl lines 3, 7-9"
    )
    assert places(["b.parquet row 2"]) == "b.parquet row 2"


@pytest.mark.parametrize(
    "option",
    ["system_prompt=x", 'system_prompt=""', "chat_template_name=x", "chat_template_file=x"],
)
def test_options_of_the_template_need_one(option):
    with pytest.raises(ConfigError, match="would be ignored with data"):
        load_config(QUICKSTART, [f"data.{option}"])
    load_config(QUICKSTART, ["data.apply_chat_template=true", f"data.{option}"])


def test_one_template_is_chosen():
    options = ["apply_chat_template=true", "chat_template_name=x", "chat_template_file=y"]
    with pytest.raises(ConfigError, match=r"one template, and data\.chat_template_name=x is"):
        load_config(QUICKSTART, [f"data.{option}" for option in options])


def test_a_backslash_that_toml_took_for_itself_is_told_in_the_system_prompt():
    options = ["data.apply_chat_template=true", r'data.system_prompt="In \boxed{}."']
    with pytest.raises(ConfigError, match=r"system_prompt=.*Write each backslash twice"):
        load_config(QUICKSTART, options)
