"""The prompt set and its order. In: a jsonl file or a built-in task. Out: prompts of iteration i.

The order is a function of the seed and the iteration alone, so a resumed run goes on where it was
without having stored anything.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_eopd.config import DataConfig
from megatron_eopd.data import countdown
from megatron_eopd.data.jsonl import read_jsonl
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import DEFAULT_TEACHER, Prompt, Turn

TokenIds = tuple[int, ...]


class PromptSet:
    def __init__(
        self,
        prompts: list[Prompt],
        seed: int,
        shuffle: bool,
        references: Sequence[tuple[TokenIds, ...]] = (),
    ) -> None:
        """`references`: the reference answers of each prompt, if there are any."""
        self._prompts = prompts
        self._references = references
        self._seed = seed
        self._shuffle = shuffle
        self._order_of: tuple[int, list[int]] = (-1, [])  # (epoch, order), the last one used

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def reference(self, prompt: Prompt, sample_index: int) -> TokenIds:
        """The answer, its end of sequence included, that stands in for a sample of the prompt; a
        prompt with several has them in turn."""
        answers = self._references[prompt.index]
        return answers[sample_index % len(answers)]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(p.prompt_ids) for p in self._prompts)

    @cached_property
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

    @cached_property
    def references_digest(self) -> str:
        """Changes with any reference answer; empty where there are none."""
        if not self._references:
            return ""
        return hashlib.sha256(json.dumps(self._references).encode()).hexdigest()

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
    *,
    max_reference_length: int | None = None,
) -> PromptSet:
    """`teachers`: names that lines may have under `data.teacher_key`; `max_reference_length`, in
    tokens: every prompt needs a reference answer under `data.response_key`, at most so long.

    Raises:
        ConfigError: a file that is missing or empty, or a line that cannot be used (which one).
    """
    if data.prompts == "countdown":
        rows = countdown_rows("train")
    else:
        rows = jsonl_rows(Path(data.prompts), data, teachers, "data.prompts")
    rows = list(rows)
    prompts = list(encode_prompts(iter(rows), data, tokenizer))
    if not prompts:
        raise ConfigError(f"data.prompts={data.prompts}: no prompts in it.")
    references: list[tuple[TokenIds, ...]] = []
    if max_reference_length is not None:
        references = _encode_references(rows, data, tokenizer, max_reference_length)
    return PromptSet(prompts, seed, data.shuffle, references)


class Row(NamedTuple):
    """A prompt before it is tokenized."""

    where: str
    """What it stands in, for messages."""
    text: str
    answer: str
    teacher: str = DEFAULT_TEACHER
    responses: tuple[str, ...] = ()
    """Reference answers."""


def countdown_rows(split: str) -> Iterator[Row]:
    """Every problem of the split."""
    for number, problem in enumerate(countdown.split(split)):
        where = f"countdown problem {number}"
        yield Row(where, problem.prompt_text(), problem.answer_text())


def prompt_encoder(data: DataConfig, tokenizer: Tokenizer) -> Callable[[str], tuple[int, ...]]:
    """What turns the text of a prompt into ids: one path for training, evaluation and tools."""
    if not data.apply_chat_template:
        return tokenizer.encode
    encode = partial(tokenizer.encode_chat, **data.chat_template_kwargs)
    return lambda text: encode([Turn("user", text)])


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


def jsonl_rows(
    path: Path, data: DataConfig, teachers: Collection[str], option: str
) -> Iterator[Row]:
    """Lines of a prompt file; `option` is the one that named it."""
    if not path.is_file():
        builtin = ", and no built-in task of that name (countdown)" * (option == "data.prompts")
        raise ConfigError(f"{option}={path}: no such file{builtin}.")
    for where, row in read_jsonl(path):
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
        responses = _responses(row.get(data.response_key)) if data.response_key else ()
        yield Row(where, prompt, "" if answer is None else str(answer), teacher, responses)


def _responses(value: Any) -> tuple[str, ...]:
    """None where there is no text, or anything but text."""
    texts = value if isinstance(value, list) else [value]
    is_text = all(isinstance(text, str) and text.strip() for text in texts)
    return tuple(texts) if is_text else ()


def _encode_references(
    rows: Sequence[Row], data: DataConfig, tokenizer: Tokenizer, max_length: int
) -> list[tuple[TokenIds, ...]]:
    """
    Raises:
        ConfigError: lines without a reference answer, or with one that is too long; all of them.
    """
    missing = [row.where for row in rows if not row.responses]
    if missing:
        raise ConfigError(
            f"data.response_key={data.response_key}: {len(missing)} of {len(rows)} prompts have no "
            f"text there, and rollout.reference_fraction needs one: {places(missing)}. Write them "
            f"with tools/generate.py, or take these lines out."
        )
    end = (tokenizer.end_id,)
    references = [tuple(tokenizer.encode_response(t) + end for t in r.responses) for r in rows]
    longest = [max(map(len, answers)) for answers in references]
    too_long = [r.where for r, length in zip(rows, longest, strict=True) if length > max_length]
    if too_long:
        raise ConfigError(
            f"data.response_key={data.response_key}: {len(too_long)} prompts have reference "
            f"answers longer than rollout.max_response_length={max_length} tokens, the longest "
            f"{max(longest)}: {places(too_long)}. Raise the option, or take these lines out."
        )
    return references


def places(wheres: Sequence[str]) -> str:
    """`FILE lines 3, 7-12` of `FILE line 3`, `FILE line 7`, …"""
    path = wheres[0].rpartition(" line ")[0]
    numbers = [int(where.rpartition(" line ")[2]) for where in wheres]
    runs = [[numbers[0], numbers[0]]]
    for number in numbers[1:]:
        if number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return f"{path} line{'s' * (len(numbers) > 1)} {shown}"
