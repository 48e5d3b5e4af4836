"""Forms of a prompt: what is read as a chat, what stays text, and what is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eopd.data.chats import Chat, Message, NotText, NoUserTurn, is_blank, read_chat
from megatron_eopd.errors import ConfigError

QUESTION = "What is 2 + 3?"
USER = {"role": "user", "content": QUESTION}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "5"}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "value",
    [
        QUESTION,
        [USER],
        USER,
        [{"from": "human", "value": QUESTION}],
        [{"role": "Human", "content": QUESTION, "name": None, "tool_calls": None}],
        {"role": ["user"], "content": [QUESTION]},
        {"from": ["human"], "value": [QUESTION]},
        [{"role": "user", "content": parts(QUESTION)}],
        [{"role": "user", "content": parts("What is", "2 + 3?")}],
        [{"role": "user", "content": [{"type": "text", "text": QUESTION, "image_url": None}]}],
        [{"role": "user", "content": [{"text": QUESTION}]}],
        [{"role": "user", "content": [QUESTION]}],
        json.dumps([USER]),
        json.dumps(USER),
        f" {json.dumps([USER], indent=2)}\n",
        json.dumps([{"id": 1} | USER]),
        json.dumps([{"from": "human", "value": QUESTION}]),
        str([USER]),
        str([USER | {"name": None}]),
        str([{"content": QUESTION, "role": "user"}]),
        str([{"name": None} | USER]),
        str([{"id": "1", "from": "human", "value": QUESTION}]),
        f"array({[USER]}, dtype=object)",
        f"array([{USER}],\n      dtype=object)",
        f"array({[USER]})",
    ],
    ids=str,
)
def test_one_question_in_every_form(value):
    chat = read_chat("here", value)
    assert chat._replace(text=chat.text.replace("\n", " ")) == Chat(QUESTION)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_conversation_ends_with_its_last_question(as_text):
    """What answers it is left off, and told; what stands before it is the context."""
    context = (
        Message("system", "Be brief."),
        Message("user", "What is 1 + 1?"),
        Message("assistant", "2"),
    )
    asked = [message._asdict() for message in context] + [USER]

    def read(messages: list) -> Chat:
        return read_chat("here", json.dumps(messages) if as_text else messages)

    assert read(asked) == Chat(QUESTION, context)
    assert read([*asked, ANSWER]) == read([*asked, ANSWER, ANSWER]) == Chat(QUESTION, context, True)
    # Of a tool that is not part of the prompt nothing has to be understood.
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
    assert read([USER, called, {"role": "tool", "content": "5"}, ANSWER]) == Chat(
        QUESTION, (), True
    )


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3] sort this",
        "{'value': f(3)}",
        '{"role": f(3), "content": g(4)}',
        "array([1, 2, 3])",
        "array([1, 2], dtype=object)",
        "[1, 2, 3]",
        '[{"a": 1}]',
        '{"role": "admin", "rights": []}',
        '[{"from": "Paris", "value": 3}]',
        '[{"role": "admin", "content": "x"}]',
        "[]",
        "{}",
        "[",
        "{x} and [y]",
        json.dumps([USER]) + " What is wrong with this JSON?",
        "[" * 100_000 + "]" * 100_000,
        "",
    ],
    ids=lambda text: text[:20],
)
def test_other_json_is_text(text):
    assert read_chat("here", text) == Chat(text)


@given(st.recursive(st.none() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_json_without_roles_is_never_a_chat(value):
    text = json.dumps(value)
    assert read_chat("here", text) == Chat(text)


def test_text_that_looks_like_messages_and_cannot_be_read_is_refused():
    """As numpy prints a list of them, without commas."""
    text = "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"
    with pytest.raises(ConfigError, match="here: looks like messages written as text"):
        read_chat("here", text)


@pytest.mark.parametrize(
    "messages,problem",
    [
        ([{"role": "user", "content": [*parts("x"), {"type": "image_url"}]}], "type image_url"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "type input_audio"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "type text"),
        ([USER, ANSWER | {"tool_calls": [{}]}, USER], r"turn 2 \(assistant\): tool_calls"),
        ([USER, ANSWER, {"role": "tool", "content": "5"}, USER], r"turn 3 \(tool\): a tool speaks"),
        ([USER, {"from": "observation", "value": "5"}, USER], "a tool speaks"),
    ],
)
def test_what_is_not_text_is_refused_by_name(messages, problem):
    for value in (messages, json.dumps(messages)):
        with pytest.raises(NotText, match=f"here.*{problem}"):
            read_chat("here", value)


@pytest.mark.parametrize("messages", [[], [SYSTEM], [ANSWER], [SYSTEM, ANSWER]])
def test_a_chat_without_a_question(messages):
    with pytest.raises(NoUserTurn, match="without a turn of the user"):
        read_chat("here", messages)


@pytest.mark.parametrize(
    "value,problem",
    [
        (5, "neither text nor chat messages"),
        (True, "neither text nor chat messages"),
        ({"text": "a"}, "neither text nor chat messages"),
        ([USER, "a"], "neither text nor chat messages"),
        ([[USER]], "neither text nor chat messages"),
        ([USER, {"role": "critic", "content": "x"}], "turn 2: role 'critic' is not known. Known"),
        ([{"role": None, "content": "x"}], "turn 1: role 'none'"),
        ([{"role": 5, "content": "x"}], "turn 1: role '5'"),
        ([{"role": "user", "content": 5}], r"turn 1 \(user\): neither text nor a list of parts"),
        ([{"role": "user", "content": [5]}], "a part is neither text nor an object"),
        ([{"role": "system", "text": "Be brief."}, USER], r"turn 1 \(system\): has neither.*text"),
        ([{"from": "system", "value": None, "content": None, "text": "x"}, USER], "but text"),
        ([{"role": "system", "parts": [{"text": "x"}]}, USER], "but parts"),
        ([USER, SYSTEM], "a system turn behind the last turn of the user"),
    ],
)
def test_what_is_no_chat_is_refused(value, problem):
    with pytest.raises(ConfigError, match=f"here.*{problem}"):
        read_chat("here", value)


def test_a_system_turn_in_a_text_has_its_text_under_a_known_key_too():
    messages = [{"role": "system", "text": "Be brief."}, USER]
    for text in (json.dumps(messages), str(messages)):
        with pytest.raises(ConfigError, match=r"turn 1 \(system\): has neither content nor value"):
            read_chat("here", text)


def test_what_nobody_can_read_is_blank():
    for text in ("", " \n\t", "\u00a0\u3000", "\u200b\u200d\ufeff", "\u2028", "\x00\x07", "\u00ad"):
        assert is_blank(text)
    for text in ("a", " . ", "\u200b0", "你", "🙂", "\u0301"):
        assert not is_blank(text)


@pytest.mark.parametrize(
    "messages,empty",
    [
        ([USER], None),
        ([SYSTEM | {"content": ""}, USER], None),  # not the same as none
        ([SYSTEM | {"content": None, "id": "1", "name": "a", "weight": 0}, USER], None),
        ([USER | {"content": " \u200b"}], "the prompt"),
        ([USER | {"content": None}], "the prompt"),
        ([{"role": "user"}], "the prompt"),
        ([USER | {"content": parts("", " ")}], "the prompt"),
        ([USER | {"content": []}], "the prompt"),
        ([USER, ANSWER | {"content": ""}, USER], "turn 2 (assistant)"),
        ([SYSTEM, USER | {"content": "\n"}, ANSWER, USER], "turn 2 (user)"),
    ],
)
def test_the_first_empty_turn_is_told(messages, empty):
    assert read_chat("here", messages).empty_turn == empty
