"""Tokenizer directories of a few kilobytes, as published ones are made."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TEXT = ["What is two plus two? It is four, says the man of the house.", "one two three"]
SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(*, all_bytes: bool = True) -> tokenizers.Tokenizer:
    """BPE over bytes: of all 256, or of those that occur."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if all_bytes else []
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 9, trainer)
    return tokenizer


def bos_in_front(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """As Llama 3's post-processor."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer


def write(directory: Path, tokenizer: tokenizers.Tokenizer | None = None, /, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json, with `config` in the latter."""
    directory.mkdir(exist_ok=True)
    (tokenizer or byte_level()).save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
