"""The prompt set and its order. In: a jsonl file or a built-in task. Out: prompts of iteration i.

The order is a function of the seed and the iteration alone, so a resumed run goes on where it was
without having stored anything.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_eopd.config import ConfigError, DataConfig
from megatron_eopd.data import countdown
from megatron_eopd.data.jsonl import read_jsonl
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.records import DEFAULT_TEACHER, Prompt


class PromptSet:
    def __init__(self, prompts: list[Prompt], seed: int, shuffle: bool) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._order_of: tuple[int, list[int]] = (-1, [])  # (epoch, order), the last one used

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(p.prompt_ids) for p in self._prompts)

    @property
    def digest(self) -> str:
        """Changes with any prompt and with their number."""
        # The default teacher says nothing, as in sets from before there was a choice.
        texts = json.dumps(
            [
                (p.text, p.answer, p.teacher)[: 3 if p.teacher != DEFAULT_TEACHER else 2]
                for p in self._prompts
            ]
        )
        return hashlib.sha256(texts.encode()).hexdigest()

    def batch(self, iteration: int, size: int) -> list[Prompt]:
        """The `size` prompts of an iteration; epochs follow each other without a gap."""
        first = iteration * size
        return [self._prompts[self._place(n)] for n in range(first, first + size)]

    def _place(self, number: int) -> int:
        epoch, position = divmod(number, len(self._prompts))
        return self._order(epoch)[position]

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._prompts)))
        if self._order_of[0] != epoch:
            generator = torch.Generator().manual_seed(hash((self._seed, epoch)) & 0x7FFFFFFF)
            order = torch.randperm(len(self._prompts), generator=generator).tolist()
            self._order_of = (epoch, order)
        return self._order_of[1]


def load_prompts(
    data: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    teachers: Collection[str] = (DEFAULT_TEACHER,),
) -> PromptSet:
    """`teachers`: names that lines may have under `data.teacher_key`.

    Raises:
        ConfigError: a file that is missing or empty, or a line that cannot be used (which one).
    """
    rows = countdown_rows("train") if data.prompts == "countdown" else _jsonl_rows(data, teachers)
    prompts = list(encode_prompts(rows, data, tokenizer))
    if not prompts:
        raise ConfigError(f"data.prompts={data.prompts}: no prompts in it.")
    return PromptSet(prompts, seed, data.shuffle)


class Row(NamedTuple):
    """A prompt before it is tokenized."""

    where: str
    """What it stands in, for messages."""
    text: str
    answer: str
    teacher: str = DEFAULT_TEACHER


def countdown_rows(split: str) -> Iterator[Row]:
    """Every problem of the split."""
    for number, problem in enumerate(countdown.split(split)):
        where = f"countdown problem {number}"
        yield Row(where, problem.prompt_text(), problem.answer_text())


def prompt_encoder(data: DataConfig, tokenizer: Tokenizer) -> Callable[[str], tuple[int, ...]]:
    """What turns the text of a prompt into ids: one path for training, evaluation and tools."""
    if data.apply_chat_template:
        return partial(tokenizer.encode_chat, **data.chat_template_kwargs)
    return tokenizer.encode


def encode_prompts(rows: Iterator[Row], data: DataConfig, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Prompts as the model sees them; `text` is with the suffix and without the template."""
    encode = prompt_encoder(data, tokenizer)
    for index, row in enumerate(rows):
        text = row.text + data.prompt_suffix
        prompt_ids = encode(text)
        if not 0 < len(prompt_ids) <= data.max_prompt_length:
            raise ConfigError(
                f"{row.where}: {len(prompt_ids)} tokens, allowed are 1 to data.max_prompt_length="
                f"{data.max_prompt_length}. Shorten the prompt or raise the option."
            )
        yield Prompt(index, text, row.answer, prompt_ids, row.teacher)


def _jsonl_rows(data: DataConfig, teachers: Collection[str]) -> Iterator[Row]:
    path = data.prompts
    if not Path(path).is_file():
        raise ConfigError(
            f"data.prompts={path}: no such file, and no built-in task of that name (countdown)."
        )
    for where, row in read_jsonl(Path(path)):
        prompt, answer = row.get("prompt"), row.get("answer")
        if not isinstance(prompt, str):
            raise ConfigError(
                f'{where}: expected {{"prompt": "…", "answer": "…"}}, got {str(row)[:80]}. '
                f"tools/prepare_data.py makes such files from others."
            )
        teacher = row.get(data.teacher_key, DEFAULT_TEACHER)
        if teacher not in teachers:
            raise ConfigError(
                f"{where}: {data.teacher_key}={teacher!r} is no teacher of this run. Known are "
                f"{', '.join(teachers)}; set data.teacher_key if the key means something else."
            )
        yield Row(where, prompt, "" if answer is None else str(answer), teacher)
