"""The forms in which data sets write a prompt. In: the value of its key. Out: a Chat.

    "What is 2 + 3?"                                     text: one turn of the user
    [{"role": "user", "content": "What is 2 + 3?"}]      messages
    [{"from": "human", "value": "What is 2 + 3?"}]       ShareGPT's
    {"role": ["user"], "content": ["What is 2 + 3?"]}    the columns of messages
    "[{'role': 'user', 'content': 'What is …'}]"         messages, written as text (JSON, Python)

A content may be a list of parts, as long as these are text.
"""

import ast
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_eopd.errors import ConfigError

Raw = dict[str, Any]
"""A message as it is found."""

ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt"),
    "system": ("system", "developer"),
}
"""A turn's role → what data sets call it, in any case."""

_ROLE_OF = {word: role for role, words in ROLES.items() for word in words}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_TOOL_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_SYSTEM_COLUMN = "system"
_NO_CONTENT = (*_ROLE_KEYS, "name", "id", "type")
"""Keys of a message under which a text is no part of what is said."""
_NAMED_ROLE = re.compile(
    rf"""["'](?:role|from)["']\s*:\s*["'](?:{"|".join((*_ROLE_OF, *_TOOL_ROLES))})["']""",
    re.IGNORECASE,
)
_NAMED_CONTENT = re.compile(r"""["'](?:content|value)["']\s*:""")
_NUMPY = re.compile(r"array\((.*?)(?:,\s*dtype=object)?\)", re.DOTALL)
"""An array of numpy's as it is printed; pandas keeps messages of parquet as one."""


class NotText(ConfigError):
    """A chat with images, sound or tools."""


class NoUserTurn(ConfigError):
    """A chat in which nobody asks."""


class Message(NamedTuple):
    """A turn, in the words of ROLES."""

    role: str
    content: str


class Chat(NamedTuple):
    """A question and what was said before it."""

    text: str
    """The last turn of the user, which the model answers."""
    context: tuple[Message, ...] = ()
    """The turns before it."""
    is_cut: bool = False
    """Whether turns behind the question were left off: answers, as a rule."""

    @property
    def turns(self) -> tuple[Message, ...]:
        """All, the question last."""
        return (*self.context, Message("user", self.text))

    @property
    def empty_turn(self) -> str | None:
        """The first that holds nothing to read, for messages. A system turn may."""
        for number, turn in enumerate(self.turns, start=1):
            if turn.role != "system" and is_blank(turn.content):
                return f"turn {number} ({turn.role})" if self.context else "the prompt"
        return None


def read_chat(where: str, value: Any) -> Chat:
    """
    Raises:
        NotText: images, sound or tools up to the question.
        NoUserTurn: there is no question.
        ConfigError: none of the forms.
    """
    if isinstance(value, str):
        messages = _messages_in(where, value)
        if messages is None:
            return Chat(value)
    else:
        messages = _messages(value)
    if messages is None:
        raise ConfigError(
            f"{where}: neither text nor chat messages, but {str(value)[:80]}. A message is "
            f"expected to have role and content, or from and value."
        )
    roles = [_role(f"{where}, turn {n}", message) for n, message in enumerate(messages, start=1)]
    if "user" not in roles:
        raise NoUserTurn(f"{where}: a chat without a turn of the user ({', '.join(roles)}).")
    last = len(roles) - 1 - roles[::-1].index("user")
    turns = [
        Message(role, _content(f"{where}, turn {n} ({role})", message))
        for n, (role, message) in enumerate(zip(roles, messages[: last + 1], strict=False), 1)
    ]
    if "system" in roles[last:]:
        raise ConfigError(f"{where}: a system turn behind the last turn of the user.")
    return Chat(turns[-1].content, tuple(turns[:-1]), is_cut=last + 1 < len(roles))


def check_system_column(where: str, row: dict[str, Any], value: Any, chat: Chat) -> None:
    """Raise ConfigError where the chat's system turn stands beside it, as LLaMA-Factory has it: to
    leave it out would ask another question. `value`: what the chat was read from."""
    text = row.get(_SYSTEM_COLUMN)
    lacks_one = value != chat.text and all(turn.role != "system" for turn in chat.context)
    if lacks_one and isinstance(text, str) and not is_blank(text):
        raise ConfigError(
            f"{where}: the column {_SYSTEM_COLUMN!r} beside the chat would not be read, "
            f"{text[:60]!r}. Make it the first turn of the chat, with the role system; or take it "
            f"out, as tools/prepare_data.py --drop-system-turns does."
        )


def is_message(value: dict[str, Any]) -> bool:
    return all(value.keys() & set(keys) for keys in (_ROLE_KEYS, _CONTENT_KEYS))


def is_blank(text: str) -> bool:
    """Whether there is nothing to read: white space, control and zero-width characters alone."""
    categories = map(unicodedata.category, text)
    return not any(c[0] != "Z" and c not in ("Cc", "Cf") for c in categories)


def is_unicode(text: str) -> bool:
    """Half a surrogate pair, which JSON can escape, is no text for a file or a tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _messages(value: Any) -> list[Raw] | None:
    """The messages that a value is; None where it is something else."""
    if isinstance(value, dict):
        role, content = _pick(value, _ROLE_KEYS), _pick(value, _CONTENT_KEYS)
        if isinstance(role, list) and isinstance(content, list) and len(role) == len(content):
            return [{"role": r, "content": c} for r, c in zip(role, content, strict=True)]
        value = [value]
    if not isinstance(value, list):
        return None
    are_messages = all(isinstance(m, dict) and m.keys() & set(_ROLE_KEYS) for m in value)
    return value if are_messages else None


def _messages_in(where: str, text: str) -> list[Raw] | None:
    """The messages that a text is JSON of, or what Python prints of them; None for other text.

    Only what begins with a message of a known role is one: a prompt may be other JSON.
    """
    inner = text.strip()
    if as_numpy := _NUMPY.fullmatch(inner):
        inner = as_numpy[1].strip()
    if not (inner.startswith(("[", "{")) and inner.endswith(("]", "}"))):
        return None
    try:
        value = json.loads(inner)
    except (ValueError, RecursionError):
        if not (_NAMED_ROLE.search(inner) and _NAMED_CONTENT.search(inner)):
            return None
        value = _printed_by_python(where, inner)
    messages = _messages(value)
    if not messages or not any(m.keys() & set(_CONTENT_KEYS) for m in messages):
        return None
    known = (*_ROLE_OF, *_TOOL_ROLES)
    return messages if str(_pick(messages[0], _ROLE_KEYS)).lower() in known else None


def _printed_by_python(where: str, text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ConfigError(
            f"{where}: looks like messages written as text, and can be read neither as JSON nor as "
            f"Python: {text[:80]}."
        ) from None


def _role(where: str, message: Raw) -> str:
    """Of ROLES, or one of tools, which is for `read_chat` to refuse where it matters."""
    word = str(_pick(message, _ROLE_KEYS)).lower()
    if word in _TOOL_ROLES:
        return word
    if word not in _ROLE_OF:
        raise ConfigError(f"{where}: role {word!r} is not known. Known are {', '.join(_ROLE_OF)}.")
    return _ROLE_OF[word]


def _content(where: str, message: Raw) -> str:
    calls = next((key for key in _TOOL_CALLS if message.get(key)), None)
    if calls is not None or _pick(message, _ROLE_KEYS).lower() in _TOOL_ROLES:
        raise NotText(f"{where}: {calls or 'a tool speaks'}. Chats with tools cannot be read.")
    content = _pick(message, _CONTENT_KEYS)
    if content is None:
        _check_says_nothing(where, message)
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConfigError(f"{where}: neither text nor a list of parts, but {str(content)[:80]}.")
    # Joined as vLLM's chat does for templates that take text.
    return "\n".join(_part(where, part) for part in content)


def _check_says_nothing(where: str, message: Raw) -> None:
    """Raise ConfigError where a message without content has text under another key: of a system
    turn, which may be empty, nobody would miss it."""
    others = [
        key
        for key, value in message.items()
        if key not in _NO_CONTENT and isinstance(value, str | list) and value
    ]
    if others:
        raise ConfigError(
            f"{where}: has neither content nor value, but {', '.join(others)}. Name the key of its "
            f"text content."
        )


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ConfigError(f"{where}: a part is neither text nor an object, but {str(part)[:80]}.")
    kind = part.get("type") or "text"
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise NotText(f"{where}: a part of type {kind}, and only text can be read: {part}"[:300])
    return part["text"]


def _pick(message: Raw, keys: Sequence[str]) -> Any:
    """The first of these that has a value; None where none has."""
    return next((message[key] for key in keys if message.get(key) is not None), None)
