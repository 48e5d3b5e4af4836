"""Tokenizers in Hugging Face directories. In: a directory. Out: a Tokenizer.

tokenizer.json is read as it stands. AutoTokenizer would build some classes anew from its vocabulary
alone: a byte-level one of class LlamaTokenizerFast, as DeepSeek's are, then loses every space.
"""

import copy
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_eopd.data.templates import ChatTemplate, choose_template
from megatron_eopd.data.tokenizer_base import Tokenizer, spelled
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn
from megatron_eopd.text_files import check_is_content, read_json_object, read_text

CONFIG = "tokenizer_config.json"
_EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")
_TOKEN_OPTIONS = ("lstrip", "rstrip", "single_word", "normalized")
_JSON_FILES = (CONFIG, "special_tokens_map.json", "added_tokens.json")
_TEXT_FILES = ("chat_template.jinja", "merges.txt", "vocab.json")
_OTHER_FILES = ("tokenizer.json", "tokenizer.model")
_BYTES = {sign: byte for byte, sign in bytes_to_unicode().items()}
"""Byte-level tokenizers spell each byte by a printable character."""


class HuggingFaceTokenizer(Tokenizer):
    """A directory with tokenizer.json, or whatever else transformers can read."""

    def __init__(
        self, path: Path, model_path: Path, vocab_size: int | None, stop_ids: Sequence[int]
    ) -> None:
        config = _checked_config(path)
        self.library = _load(path, _extra_tokens(path, config))
        """The tokenizer of transformers."""
        self.bos_id = self.library.bos_token_id
        self.eos_id = self.library.eos_token_id
        self.pad_id = self.library.pad_token_id
        self._front = self._find_front(config.get("add_bos_token"))
        self._template: ChatTemplate | None = None
        super().__init__(path, model_path, vocab_size, stop_ids)

    def encode(self, text: str) -> tuple[int, ...]:
        ids = self.encode_response(text)
        has_front = ids[: len(self._front)] == self._front
        return self._with_one_bos(ids if has_front else self._front + ids)

    def encode_response(self, text: str) -> tuple[int, ...]:
        return tuple(self.library.encode(text, add_special_tokens=False))

    def encode_chat(self, turns: Sequence[Turn], /, **options: Any) -> tuple[int, ...]:
        # A template brings its own beginning of sequence, if the model wants one.
        return self._with_one_bos(self.encode_response(self.render_chat(turns, **options)))

    def render_chat(
        self, turns: Sequence[Turn], /, *, begin_answer: bool = True, **options: Any
    ) -> str:
        if self._template is None:
            self._template = choose_template(self.path)
        bos = self.library.bos_token or ""
        # A prompt that was written for use without a template may begin with it.
        turns = [turn._replace(content=turn.content.removeprefix(bos)) for turn in turns]
        special_tokens = self.library.special_tokens_map
        return self._template.render(turns, special_tokens, options, begin_answer=begin_answer)

    def with_template(self, name: str | None, file: Path | None) -> "HuggingFaceTokenizer":
        other = copy.copy(self)
        other._template = choose_template(self.path, name, file)
        return other

    def _find_front(self, wants_bos: bool | None) -> tuple[int, ...]:
        """What stands before every prompt: what the tokenizer's own post-processor puts there, and
        the beginning of sequence as tokenizer_config.json's add_bos_token says, if it does.

        transformers 4 rebuilt the post-processor of Llama's, Gemma's and other classes by that
        word, and models were trained and served so; transformers 5 does not read it.
        """
        plain = self.library.encode("a0", add_special_tokens=False)
        whole = self.library.encode("a0") if plain else []
        front = tuple(takewhile(lambda i: i not in plain, whole))
        if self.bos_id is None or wants_bos is None or wants_bos == (self.bos_id in front):
            return front
        return (self.bos_id, *front) if wants_bos else tuple(i for i in front if i != self.bos_id)

    def _with_one_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        first = next((n for n, i in enumerate(ids) if i != self.bos_id), len(ids))
        return ids[max(first - 1, 0) :]

    def _decode(self, token_ids: list[int], *, special: bool) -> str:
        # No cleaning up, which takes out the space before a comma that the model did write.
        return self.library.decode(
            token_ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )

    def _content(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.content.encode()
        token = self.library.convert_ids_to_tokens(token_id) or ""
        if self._decoder is None:  # then texts have a space between all tokens
            return f" {token}".encode()
        if "ByteLevel" not in self._decoder:
            return spelled(token)
        return bytes(_BYTES[sign] for sign in token if sign in _BYTES)

    def _is_special(self, token_id: int) -> bool:
        added = self._added.get(token_id)
        return added is not None and added.special

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        """The library makes it anew whenever it is asked, in milliseconds where there are many."""
        return self.library.added_tokens_decoder

    @cached_property
    def _decoder(self) -> str | None:
        """The description of how the library makes text of tokens."""
        decoder = getattr(self.library, "backend_tokenizer", None)
        decoder = getattr(decoder, "decoder", None)
        return None if decoder is None else decoder.__getstate__().decode()

    def vocabulary(self) -> dict[str, int]:
        return self.library.get_vocab()

    def special_tokens(self) -> dict[str, int]:
        added = self.library.added_tokens_decoder.items()
        return {token.content: i for i, token in added if token.special}

    def __len__(self) -> int:
        return len(self.library)


def _load(path: Path, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    has_json = (path / "tokenizer.json").is_file()
    try:
        tokenizer = (PreTrainedTokenizerFast if has_json else AutoTokenizer).from_pretrained(
            path, local_files_only=True, trust_remote_code=False, chat_template=None, **options
        )
    # A damaged file raises whatever comes of it: KeyError, TypeError, a bare Exception.
    except Exception as error:
        if has_json:
            _check_json(path / "tokenizer.json")
        raise ConfigError(
            f"{path}: no tokenizer can be loaded ({error!r}). Copy tokenizer.json and {CONFIG} "
            f"there again, or set student.tokenizer."
        ) from None
    # Without tokenizer.json transformers makes one that is still to be trained.
    if len(tokenizer) == len(tokenizer.added_tokens_decoder):
        raise ConfigError(
            f"{path}: the tokenizer there has special tokens only. Copy tokenizer.json there."
        )
    return tokenizer


def _extra_tokens(path: Path, config: dict[str, Any]) -> dict[str, list]:
    """Options of `from_pretrained` where a list of tokens without a role of their own has objects,
    as transformers 4 wrote it: 5 wants them made into tokens."""
    file = path / "special_tokens_map.json"
    # With added_tokens_decoder transformers does not read that file.
    is_read = file.is_file() and "added_tokens_decoder" not in config
    places = [config, read_json_object(file)] if is_read else [config]
    lists = [place.get(key) for place in places for key in _EXTRA_TOKENS]
    found = [token for some in lists if isinstance(some, list) for token in some]
    if not any(map(_is_token, found)):
        return {}
    tokens = [_added_token(token) if _is_token(token) else token for token in found]
    distinct = list({str(token): token for token in tokens}.values())
    return dict.fromkeys(_EXTRA_TOKENS, distinct)


def _is_token(token: Any) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str)


def _added_token(token: dict[str, Any]) -> tokenizers.AddedToken:
    options = {key: token[key] for key in _TOKEN_OPTIONS if key in token}
    return tokenizers.AddedToken(token["content"], special=True, **options)


def _check_json(path: Path) -> None:
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other class
        raise ConfigError(
            f"{path}: no tokenizer can be loaded ({error}). Copy or download it again."
        ) from None


def _checked_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, if there is one.

    Raises:
        ConfigError: a file is not what its name says, or the tokenizer is Python code of its own.
    """
    for names, check in (
        (_JSON_FILES, read_json_object),
        (_TEXT_FILES, read_text),
        (_OTHER_FILES, check_is_content),
    ):
        for name in names:
            if (path / name).is_file():
                check(path / name)
    config = read_json_object(path / CONFIG) if (path / CONFIG).is_file() else {}
    auto_map = config.get("auto_map")
    code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    if code:
        raise ConfigError(
            f"{path / CONFIG}: the tokenizer is Python code that comes with the model (auto_map: "
            f"{code}), and such code is never run here. If tokenizer.json there says all, take "
            f"auto_map out of {CONFIG}; else write one with transformers "
            f"(AutoTokenizer.from_pretrained(…, trust_remote_code=True).save_pretrained(…)), and "
            f"set student.tokenizer and teacher.tokenizer to that directory."
        )
    return config
