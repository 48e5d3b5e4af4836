"""Text to token ids and back. In: a Hugging Face directory or a SentencePiece model file."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from megatron_eopd.data.tokenizer_base import Tokenizer, spelled
from megatron_eopd.data.tokenizer_hf import HuggingFaceTokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn
from megatron_eopd.text_files import check_is_content

_HF_FILES = ("tokenizer.json", "tokenizer_config.json")
_FILES = (*_HF_FILES, "*.model", "*vocab*", "*.tiktoken", "merges.txt")
"""One of these is what a tokenizer is made of."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file. It adds no beginning-of-sequence token, and has no template."""

    def __init__(
        self, path: Path, model_path: Path, vocab_size: int | None, stop_ids: Sequence[int]
    ) -> None:
        check_is_content(path)
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
        return self.encode_response(text)  # it adds nothing to a prompt either

    def encode_response(self, text: str) -> tuple[int, ...]:
        return tuple(self._processor.encode(text))

    def encode_chat(self, turns: Sequence[Turn], /, **options: Any) -> tuple[int, ...]:
        raise self._no_template()

    def render_chat(
        self, turns: Sequence[Turn], /, *, begin_answer: bool = True, **options: Any
    ) -> str:
        raise self._no_template()

    def with_template(self, name: str | None, file: Path | None) -> Tokenizer:
        raise self._no_template()

    def _no_template(self) -> ConfigError:
        return ConfigError(
            f"data.apply_chat_template=true, but {self.path} is a SentencePiece model, which has "
            f"no chat template. Set data.apply_chat_template=false, or student.tokenizer to a "
            f"Hugging Face directory with a template."
        )

    def _decode(self, token_ids: list[int], *, special: bool) -> str:
        if not special:
            return self._processor.decode(token_ids)
        return "".join(
            "".join(map(self._processor.id_to_piece, ids))
            if is_control
            else self._processor.decode(list(ids))
            for is_control, ids in groupby(token_ids, self._processor.is_control)
        )

    def _content(self, token_id: int) -> bytes:
        return spelled(self._processor.id_to_piece(token_id))

    def _is_special(self, token_id: int) -> bool:
        return self._processor.is_control(token_id)

    def vocabulary(self) -> dict[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(len(self._processor))}

    def special_tokens(self) -> dict[str, int]:
        return {}  # it takes no text for a control token

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
    if not any(next(path.glob(pattern), None) for pattern in _FILES):
        raise ConfigError(
            f"{path}: no tokenizer there, neither tokenizer.json nor tokenizer.model nor a "
            f"vocabulary of another kind. Copy the model's tokenizer files there, or set tokenizer "
            f"beside hf_path, of the student or teacher, to the directory that has them."
        )
    has_hf_files = any((path / name).is_file() for name in _HF_FILES)
    if (path / "tokenizer.model").is_file() and not has_hf_files:
        return SentencePieceTokenizer(path / "tokenizer.model", model_path, vocab_size, stop_ids)
    return HuggingFaceTokenizer(path, model_path, vocab_size, stop_ids)


def _present(token_id: int) -> int | None:
    """SentencePiece says −1 for a special token that a model does without."""
    return token_id if token_id >= 0 else None
