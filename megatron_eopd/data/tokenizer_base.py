"""What data, rollouts and evaluation know of a tokenizer.

A model may have more columns than its tokenizer has ids, never fewer: Qwen3's ids end at 151,668,
and the model has 151,936 columns.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn
from megatron_eopd.text_files import read_json_object

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece, and who follows it, spells a single byte."""
SPACE_SIGN = "▁"
"""Likewise a space."""
_FILES_WITH_EOS = ("generation_config.json", "config.json")


class Tokenizer(ABC):
    """The few verbs that this project needs of a tokenizer. Made by `load_tokenizer`."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    def __init__(
        self, path: Path, model_path: Path, vocab_size: int | None, stop_ids: Sequence[int]
    ) -> None:
        self.path = path
        self.model_path = model_path
        self.num_ids = 1 + max(self.vocabulary().values())
        """One more than the largest id. Not `len`: added tokens may leave gaps."""
        self.vocab_size = vocab_size or self.num_ids
        """Columns of the model."""
        self._given_stop_ids = tuple(stop_ids)

    @abstractmethod
    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a prompt: those of its text, behind the beginning-of-sequence token that its
        tokenizer puts in front, once. Nothing is added at the end, where the model goes on."""

    @abstractmethod
    def encode_response(self, text: str) -> tuple[int, ...]:
        """Ids of a text that goes on behind a prompt: nothing is added in front or behind."""

    @abstractmethod
    def encode_chat(self, turns: Sequence[Turn], /, **options: Any) -> tuple[int, ...]:
        """The turns as the chat template renders them, up to where the assistant begins.

        Raises:
            ConfigError: there is no template, it leaves out a turn's text, or it reads no variable
                of an option's name.
        """

    @abstractmethod
    def render_chat(
        self, turns: Sequence[Turn], /, *, begin_answer: bool = True, **options: Any
    ) -> str:
        """The text that `encode_chat` encodes; with `begin_answer=False` up to the end of the last
        turn."""

    @abstractmethod
    def with_template(self, name: str | None, file: Path | None) -> "Tokenizer":
        """The same, with the chat template of that name, or of that file, or its default one.

        Raises:
            ConfigError: there is none such, with the names that there are.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of tokens."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """The whole vocabulary."""

    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """Those that are made of a text too, where it spells them: spelling → id."""

    @abstractmethod
    def _decode(self, token_ids: list[int], *, special: bool) -> str:
        """With the text of special tokens or without; the ids lie in [0, num_ids)."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens. Padded columns of the model, which it can sample, have none.

        Raises:
            ConfigError: an id that the model has no column for.
        """
        outside = [i for i in token_ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ConfigError(
                f"{self.path}: token id {outside[0]} is not in 0 to {self.vocab_size - 1}. It was "
                f"written with another tokenizer: set student.tokenizer to that one."
            )
        return self._decode([i for i in token_ids if i < self.num_ids], special=False)

    def show(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens, for people; what is no token of this one as `<id 7>`."""
        parts = []
        for is_known, ids in groupby(token_ids, lambda i: 0 <= i < self.num_ids):
            if is_known:
                parts.append(self._decode(list(ids), special=True))
            else:
                parts += [f"<id {i}>" for i in ids]
        return "".join(parts)

    @abstractmethod
    def _content(self, token_id: int) -> bytes:
        """What one token stands for within a text; the id lies in [0, num_ids)."""

    @abstractmethod
    def _is_special(self, token_id: int) -> bool: ...

    def piece(self, token_id: int) -> tuple[bytes, bool]:
        """(what a token stands for, whether it is special), for people: a token may be a part of a
        character, hence bytes. What is no token of this one is special, as `<id 7>`."""
        if not 0 <= token_id < self.num_ids:
            return f"<id {token_id}>".encode(), True
        return self._content(token_id), self._is_special(token_id)

    def token_id(self, token: str) -> int | None:
        """Of a token as the vocabulary spells it; None if there is no such token."""
        return self.vocabulary().get(token)

    @property
    def digest(self) -> str:
        """Equal for tokenizers that give every token the same id."""
        vocabulary = sorted(self.vocabulary().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    @cached_property
    def own_stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response by the model's own files: the first that are named by its
        generation_config.json, its config.json, the tokenizer. Empty where none names any."""
        candidates = [_named_eos(self.model_path / name) for name in _FILES_WITH_EOS]
        return next(filter(None, candidates), () if self.eos_id is None else (self.eos_id,))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: those given, or else the model's own.

        Raises:
            ConfigError: there are none.
        """
        stop_ids = self._given_stop_ids or self.own_stop_ids
        if not stop_ids:
            raise ConfigError(
                f"{self.model_path}: no end-of-sequence id in generation_config.json, config.json "
                f"or the tokenizer {self.path}. Set rollout.stop_token_ids."
            )
        return stop_ids

    @property
    def end_id(self) -> int:
        """The id that ends a text which no model wrote: the tokenizer's own end of sequence where
        it is one of `stop_ids`, which is how its chat template ends a turn; else the first."""
        return self.eos_id if self.eos_id in self.stop_ids else self.stop_ids[0]


def spelled(token: str) -> bytes:
    """What a token of a SentencePiece vocabulary stands for, by its spelling."""
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace(SPACE_SIGN, " ").encode()


def _named_eos(path: Path) -> tuple[int, ...]:
    value = read_json_object(path).get("eos_token_id") if path.is_file() else None
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise ConfigError(
            f"{path}: eos_token_id={value!r} is neither a token id nor a list of them. Correct it, "
            f"or set rollout.stop_token_ids."
        )
    return tuple(ids)
