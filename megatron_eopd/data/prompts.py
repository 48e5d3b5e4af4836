"""The prompt set and its order. In: a file or a built-in task. Out: prompts of iteration i.

The order is a function of the seed and the iteration alone, so a resumed run goes on where it was
without having stored anything.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_eopd.config import DataConfig
from megatron_eopd.data.prompt_files import Row, places, prompt_rows
from megatron_eopd.data.prompt_warnings import SpecialTexts, clock_warnings
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
        num_cut: int = 0,
        warnings: Sequence[str] = (),
    ) -> None:
        """`references`: the reference answers of each prompt, if there are any; the others: see
        below."""
        self._prompts = prompts
        self.num_cut = num_cut
        """Chats that went on behind their last user turn, and were cut there."""
        self.warnings = warnings
        """What nobody can tell to be wrong, and a person should look at."""
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

    def sequences(self) -> Iterator[tuple[Prompt, TokenIds]]:
        """Every prompt with its ids, and with those of each reference answer to it."""
        for prompt in self._prompts:
            yield prompt, prompt.prompt_ids
        for prompt, answers in zip(self._prompts, self._references, strict=False):
            yield from ((prompt, answer) for answer in answers)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(p.prompt_ids) for p in self._prompts)

    @cached_property
    def digest(self) -> str:
        """Changes with any turn of a prompt and with the number of prompts."""
        return _digest(self._identity(prompt) for prompt in self._prompts)

    def _identity(self, prompt: Prompt) -> tuple[Any, ...]:
        # What is as in sets from before there was a choice says nothing, so that runs go on.
        length = 4 if prompt.context else 3 if prompt.teacher != DEFAULT_TEACHER else 2
        return (prompt.text, prompt.answer, prompt.teacher, prompt.context)[:length]

    @cached_property
    def references_digest(self) -> str:
        """Changes with any reference answer; empty where there are none."""
        return _digest(self._references) if self._references else ""

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


def _digest(items: Iterable[Any]) -> str:
    """Of the JSON of their list, which is never whole in memory."""
    sha = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        sha.update((", " * (number > 0) + json.dumps(item)).encode())
    sha.update(b"]")
    return sha.hexdigest()


def load_prompts(
    data: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    teachers: Collection[str] = (DEFAULT_TEACHER,),
    *,
    rows: Iterable[Row] | None = None,
    max_reference_length: int | None = None,
) -> PromptSet:
    """`teachers`: names that lines may have under `data.teacher_key`; `rows`: of a built-in task,
    where `data.prompts` names one; `max_reference_length`, in tokens: every prompt needs a
    reference answer under `data.response_key`, at most so long.

    Raises:
        ConfigError: a file that is missing or empty, or a line that cannot be used (which one).
    """
    if rows is None:
        rows = prompt_rows(Path(data.prompts), data, teachers)
    encoder = PromptEncoder(data, tokenizer)
    references = None
    if max_reference_length is not None:
        references = _References(data, tokenizer, max_reference_length)
    prompts: list[Prompt] = []
    special = SpecialTexts(tokenizer)
    num_cut = 0
    for row in rows:
        prompts.append(encoder.prompt(len(prompts), row))
        special.look_at(row.where, (turn.content for turn in prompts[-1].turns))
        num_cut += row.is_cut
        if references is not None:
            references.add(row)
    if not prompts:
        raise ConfigError(f"data.prompts={data.prompts}: no prompts in it.")
    warnings = special.warnings()
    if data.apply_chat_template:  # the last prompt's chat stands for all
        options = data.chat_template_kwargs
        warnings += clock_warnings(encoder.tokenizer, prompts[-1].turns, **options)
    return PromptSet(
        prompts,
        seed,
        data.shuffle,
        references.checked() if references is not None else (),
        num_cut,
        warnings + (references.warnings() if references is not None else []),
    )


class PromptEncoder:
    """What makes prompts of rows: one path for training, evaluation and tools."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        """
        Raises:
            ConfigError: there is no such chat template.
        """
        self._data = data
        self.tokenizer = tokenizer
        """With the chat template that was chosen."""
        if data.apply_chat_template:
            self.tokenizer = tokenizer.with_template(
                data.chat_template_name, data.chat_template_file
            )
        self._share = _shared_ids(tokenizer)

    def turns(self, row: Row) -> tuple[Turn, ...]:
        """The whole chat as the model is shown it, the user's question with its suffix last.

        Raises:
            ConfigError: two system turns, or a chat and no template to write it with.
        """
        turns = (*row.context, Turn("user", row.text + self._data.prompt_suffix))
        if self._data.system_prompt is not None:
            if any(turn.role == "system" for turn in row.context):
                raise ConfigError(
                    f"{row.where}: has a system turn, and data.system_prompt is another. Leave the "
                    f"option out, or take such turns out with tools/prepare_data.py "
                    f"--drop-system-turns."
                )
            turns = (Turn("system", self._data.system_prompt), *turns)
        if len(turns) > 1 and not self._data.apply_chat_template:
            raise ConfigError(
                f"{row.where}: a chat ({', '.join(turn.role for turn in turns)}), which only a "
                f"chat template can write. Set data.apply_chat_template=true, or leave out what is "
                f"more than a question: tools/prepare_data.py --single-turn --drop-system-turns."
            )
        return turns

    def ids(self, row: Row) -> TokenIds:
        """
        Raises:
            ConfigError: as `turns`; or the template refuses the chat.
        """
        return self._encode(row.where, self.turns(row))

    def _encode(self, where: str, turns: Sequence[Turn]) -> TokenIds:
        if not self._data.apply_chat_template:
            return self.tokenizer.encode(turns[-1].content)
        try:
            return self.tokenizer.encode_chat(turns, **self._data.chat_template_kwargs)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def prompt(self, index: int, row: Row) -> Prompt:
        """`text` is the last user turn, with the suffix and without the template.

        Raises:
            ConfigError: as `ids`; or nothing is left of the row, or too much.
        """
        turns = self.turns(row)
        prompt_ids = self._share(self._encode(row.where, turns))
        if not 0 < len(prompt_ids) <= self._data.max_prompt_length:
            raise ConfigError(
                f"{row.where}: {len(prompt_ids)} tokens, allowed are 1 to data.max_prompt_length="
                f"{self._data.max_prompt_length}. Shorten the prompt or raise the option."
            )
        text = turns[-1].content
        return Prompt(index, text, row.answer, prompt_ids, row.teacher, turns[:-1])


def _shared_ids(tokenizer: Tokenizer) -> Callable[[TokenIds], TokenIds]:
    """The same ids, with one object for each however often it comes: a fresh one takes 28 bytes
    beside the 8 of its place, and a million prompts have a hundred million."""
    objects = list(range(tokenizer.num_ids))
    return lambda ids: tuple(map(objects.__getitem__, ids))


def encode_prompts(rows: Iterable[Row], data: DataConfig, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Prompts as the model sees them."""
    encoder = PromptEncoder(data, tokenizer)
    for index, row in enumerate(rows):
        yield encoder.prompt(index, row)


class _References:
    """Reference answers in tokens, taken row by row."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, max_length: int) -> None:
        self._key = data.response_key
        self._tokenizer = tokenizer
        self._share = _shared_ids(tokenizer)
        self._max_length = max_length
        self._encoded: list[tuple[TokenIds, ...]] = []
        self._missing: list[str] = []
        self._too_long: list[str] = []
        self._longest = 0
        self._special = SpecialTexts(tokenizer)
        self._num_ended = 0

    def add(self, row: Row) -> None:
        answers = tuple(self._ids(row.where, text) for text in row.responses)
        longest = max(map(len, answers), default=0)
        self._encoded.append(answers)
        self._longest = max(longest, self._longest)
        if not answers:
            self._missing.append(row.where)
        if longest > self._max_length:
            self._too_long.append(row.where)

    def _ids(self, where: str, text: str) -> TokenIds:
        """With the run's own end, in the place of one that the text spells out: many files have it.

        Raises:
            ConfigError: it spells one out before its end.
        """
        encode, stops = self._tokenizer.encode_response, set(self._tokenizer.stop_ids)
        ids = encode(text)
        if stops & set(ids):
            ids = encode(text.rstrip())
            if len(ids) > 1 and ids[-1] in stops:
                ids = ids[:-1]
                text = self._tokenizer.show(ids)
                self._num_ended += 1
        if inside := stops & set(ids):
            raise ConfigError(
                f"{where}: a reference answer, data.response_key={self._key}, has "
                f"{self._tokenizer.show(sorted(inside))} in its text, which ends a response. Take "
                f"it out, and what stands behind it."
            )
        self._special.look_at(where, [text])
        return self._share((*ids, self._tokenizer.end_id))

    def warnings(self) -> list[str]:
        ended = (
            f"{self._num_ended} reference answers spell out a token that ends a response at their "
            f"end. It was taken off, since the run puts "
            f"{self._tokenizer.show([self._tokenizer.end_id])} there."
        )
        return [ended] * (self._num_ended > 0) + self._special.warnings("reference answers")

    def checked(self) -> list[tuple[TokenIds, ...]]:
        """
        Raises:
            ConfigError: rows without a reference answer, or with one that is too long; all of them.
        """
        if self._missing:
            raise ConfigError(
                f"data.response_key={self._key}: {len(self._missing)} of {len(self._encoded)} "
                f"prompts have no text there, and rollout.reference_fraction needs one: "
                f"{places(self._missing)}. Write them with tools/generate.py, or take these lines "
                f"out."
            )
        if self._too_long:
            raise ConfigError(
                f"data.response_key={self._key}: {len(self._too_long)} prompts have reference "
                f"answers longer than rollout.max_response_length={self._max_length} tokens, the "
                f"longest {self._longest}: {places(self._too_long)}. Raise the option, or take "
                f"these lines out."
            )
        return self._encoded
