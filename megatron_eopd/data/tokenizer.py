"""Text to token ids and back. In: a Hugging Face directory or a SentencePiece model file.

Data, rollouts and evaluation know `Tokenizer` only. A model may have more columns than its
tokenizer has ids, never fewer: Qwen3's ids end at 151,668, and the model has 151,936 columns.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

# Private, and the only reading of a template that knows every tag and function which transformers
# adds to Jinja. It is jinja2.meta.find_undeclared_variables in that environment.
from transformers.utils.chat_template_utils import _get_template_variables

from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn

_HF_FILES = ("tokenizer.json", "tokenizer_config.json")
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
        self.num_ids = 1 + max(self._id_of_token().values())
        """One more than the largest id. Not `len`: added tokens may leave gaps."""
        self.vocab_size = vocab_size or self.num_ids
        """Columns of the model."""
        self._given_stop_ids = tuple(stop_ids)

    @abstractmethod
    def encode(self, text: str) -> tuple[int, ...]:
        """Exactly the ids that the tokenizer's own library gives."""

    @abstractmethod
    def encode_response(self, text: str) -> tuple[int, ...]:
        """Ids of a text that goes on behind a prompt: nothing is added in front or behind."""

    @abstractmethod
    def encode_chat(self, turns: Sequence[Turn], /, **options: Any) -> tuple[int, ...]:
        """The turns as the chat template renders them, up to where the assistant begins.

        Raises:
            ConfigError: there is no template, or it reads no variable of an option's name.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of tokens."""

    @abstractmethod
    def _id_of_token(self) -> dict[str, int]:
        """The whole vocabulary."""

    @abstractmethod
    def _decode(self, token_ids: list[int]) -> str:
        """As `decode`; the ids lie in [0, num_ids)."""

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
        return self._decode([i for i in token_ids if i < self.num_ids])

    def token_id(self, token: str) -> int | None:
        """Of a token as the vocabulary spells it; None if there is no such token."""
        return self._id_of_token().get(token)

    @property
    def digest(self) -> str:
        """Equal for tokenizers that give every token the same id."""
        vocabulary = sorted(self._id_of_token().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: those given, or else the first that are named by the model's
        generation_config.json, its config.json, the tokenizer.

        Raises:
            ConfigError: none of them names any.
        """
        candidates = [self._given_stop_ids or None]
        candidates += [_named_eos(self.model_path / name) for name in _FILES_WITH_EOS]
        for ids in (*candidates, self.eos_id):
            if ids is not None:
                return (ids,) if isinstance(ids, int) else tuple(ids)
        raise ConfigError(
            f"{self.model_path}: no end-of-sequence id in generation_config.json, config.json or "
            f"the tokenizer {self.path}. Set rollout.stop_token_ids."
        )

    @property
    def end_id(self) -> int:
        """The id that ends a text which no model wrote: the tokenizer's own end of sequence where
        it is one of `stop_ids`, which is how its chat template ends a turn; else the first."""
        return self.eos_id if self.eos_id in self.stop_ids else self.stop_ids[0]


class HuggingFaceTokenizer(Tokenizer):
    """A directory with tokenizer.json, or whatever else transformers can read."""

    def __init__(
        self, path: Path, model_path: Path, vocab_size: int | None, stop_ids: Sequence[int]
    ) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
        # A damaged file raises whatever comes of it: KeyError, TypeError, a bare Exception.
        except Exception as error:
            raise ConfigError(
                f"{path}: no tokenizer can be loaded ({error!r}). Copy tokenizer.json and "
                f"tokenizer_config.json there, or set student.tokenizer."
            ) from None
        # Without tokenizer.json transformers makes one that is still to be trained.
        if len(self._tokenizer) == len(self._tokenizer.added_tokens_decoder):
            raise ConfigError(
                f"{path}: the tokenizer there has special tokens only. Copy tokenizer.json there."
            )
        self.bos_id = self._tokenizer.bos_token_id
        self.eos_id = self._tokenizer.eos_token_id
        self.pad_id = self._tokenizer.pad_token_id
        super().__init__(path, model_path, vocab_size, stop_ids)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text))

    def encode_response(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_chat(self, turns: Sequence[Turn], /, **options: Any) -> tuple[int, ...]:
        unknown = options.keys() - self._template_variables
        if unknown:
            # Jinja ignores a variable that no template reads: a typo would be a different run.
            raise ConfigError(
                f"data.chat_template_kwargs.{min(unknown)}: the chat template of {self.path} reads "
                f"no such variable. It reads {', '.join(sorted(self._template_variables))}."
            )
        messages = [turn._asdict() for turn in turns]
        ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **options
        )
        return tuple(ids)

    @cached_property
    def _template_variables(self) -> frozenset[str]:
        """What the chat template reads, less what is set here and by the tokenizer."""
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                f"data.apply_chat_template=true, but {self.path} has no chat template. Set "
                f"data.apply_chat_template=false."
            )
        own = {"messages", "add_generation_prompt", *self._tokenizer.special_tokens_map}
        return _get_template_variables(self._tokenizer.get_chat_template()) - own

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _id_of_token(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def __len__(self) -> int:
        return len(self._tokenizer)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file. It adds no beginning-of-sequence token, and has no template."""

    def __init__(
        self, path: Path, model_path: Path, vocab_size: int | None, stop_ids: Sequence[int]
    ) -> None:
        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"{path}: not a SentencePiece model ({error}). Give a .model file that "
                f"SentencePiece wrote, or the directory of a Hugging Face tokenizer."
            ) from None
        self.bos_id = _present(self._processor.bos_id())
        self.eos_id = _present(self._processor.eos_id())
        self.pad_id = _present(self._processor.pad_id())
        super().__init__(path, model_path, vocab_size, stop_ids)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._processor.encode(text))

    def encode_response(self, text: str) -> tuple[int, ...]:
        return self.encode(text)  # it adds nothing to a prompt either

    def encode_chat(self, turns: Sequence[Turn], /, **options: Any) -> tuple[int, ...]:
        raise ConfigError(
            f"data.apply_chat_template=true, but {self.path} is a SentencePiece model, which has "
            f"no chat template. Set data.apply_chat_template=false, or student.tokenizer to a "
            f"Hugging Face directory with a template."
        )

    def _decode(self, token_ids: list[int]) -> str:
        return self._processor.decode(token_ids)

    def _id_of_token(self) -> dict[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(len(self._processor))}

    def __len__(self) -> int:
        return len(self._processor)


def load_tokenizer(
    path: Path,
    *,
    model_path: Path | None = None,
    vocab_size: int | None = None,
    stop_ids: Sequence[int] = (),
) -> Tokenizer:
    """A file is a SentencePiece model. So is a directory with tokenizer.model and neither
    tokenizer.json nor tokenizer_config.json; any other directory is Hugging Face's.

    `model_path` has generation_config.json and config.json, by default it is the tokenizer's own
    directory; `vocab_size` is the model's, by default the tokenizer's; `stop_ids` replace those
    that would be found.

    Raises:
        ConfigError: there is nothing at that path, or no tokenizer.
    """
    path = Path(path)
    if path.is_file():
        return SentencePieceTokenizer(path, model_path or path.parent, vocab_size, stop_ids)
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such file or directory. Give a SentencePiece .model file or the directory "
            f"of a Hugging Face tokenizer."
        )
    model_path = model_path or path
    has_hf_files = any((path / name).is_file() for name in _HF_FILES)
    if (path / "tokenizer.model").is_file() and not has_hf_files:
        return SentencePieceTokenizer(path / "tokenizer.model", model_path, vocab_size, stop_ids)
    return HuggingFaceTokenizer(path, model_path, vocab_size, stop_ids)


def _named_eos(path: Path) -> int | list[int] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: not a JSON object ({error}).") from None


def _present(token_id: int) -> int | None:
    """SentencePiece says −1 for a special token that a model does without."""
    return token_id if token_id >= 0 else None
