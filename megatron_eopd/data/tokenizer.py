"""The tokenizer of a Hugging Face directory, behind the few verbs that this project needs."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from megatron_eopd.config import ConfigError
from megatron_eopd.models.build import read_hf_config


class Tokenizer:
    def __init__(self, hf_path: Path) -> None:
        """
        Raises:
            ConfigError: the directory holds no tokenizer.
        """
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(hf_path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{hf_path}: no tokenizer can be loaded ({error}). Copy tokenizer.json and "
                f"tokenizer_config.json there."
            ) from None
        self.stop_ids = _stop_ids(hf_path, self._tokenizer.eos_token_id)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text))

    def encode_chat(self, user_text: str) -> tuple[int, ...]:
        """One user turn of the chat template, up to where the assistant begins."""
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                "data.apply_chat_template=true, but the student's tokenizer has no chat template. "
                "Set data.apply_chat_template=false."
            )
        turns = [{"role": "user", "content": user_text}]
        ids = self._tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
        return tuple(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    @property
    def digest(self) -> str:
        """Equal for tokenizers that give every token the same id."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._tokenizer)


def _stop_ids(hf_path: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Ids that end a response, from generation_config.json, config.json or the tokenizer."""
    candidates: list = []
    if (Path(hf_path) / "generation_config.json").is_file():
        candidates.append(GenerationConfig.from_pretrained(hf_path).eos_token_id)
    candidates += [read_hf_config(hf_path).eos_token_id, tokenizer_eos]
    for ids in candidates:
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    raise ConfigError(
        f"{hf_path}: no end-of-sequence id in generation_config.json, config.json or the "
        f"tokenizer. Set eos_token_id in generation_config.json."
    )


def check_same_vocabulary(
    student_path: Path, student: Tokenizer, teacher_path: Path, teacher: Tokenizer
) -> None:
    """Raise ConfigError unless teacher and student give every token the same id.

    The loss compares the two distributions column by column; with different vocabularies it would
    still give numbers, and they would mean nothing.
    """
    sizes = [read_hf_config(path).vocab_size for path in (student_path, teacher_path)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"vocab_size is {sizes[0]} in {student_path} (student) and {sizes[1]} in "
            f"{teacher_path} (teacher). Distillation compares them column by column: use models "
            f"that share a vocabulary."
        )
    if student.digest != teacher.digest:
        raise ConfigError(
            f"the tokenizers of {student_path} (student, {len(student)} tokens) and {teacher_path} "
            f"(teacher, {len(teacher)} tokens) give tokens different ids. Use models that share a "
            f"vocabulary."
        )
    if student.stop_ids != teacher.stop_ids:
        raise ConfigError(
            f"the student ends a response with ids {student.stop_ids}, the teacher with "
            f"{teacher.stop_ids}: at every end of a response the teacher would score a token it "
            f"never writes. Set the same eos_token_id in both generation_config.json files."
        )
