"""The prompt set and its order. In: a file or a built-in task. Out: prompts of iteration i.

The order is a function of the seed and the iteration alone, so a resumed run goes on where it was
without having stored anything.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_eopd.config import DataConfig
from megatron_eopd.data.encoding import PromptEncoder, TokenIds, shared_ids
from megatron_eopd.data.prompt_files import Row, places, prompt_rows
from megatron_eopd.data.prompt_warnings import SpecialTexts, clock_warnings
from megatron_eopd.data.teacher_prompts import PromptsOfTeachers
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import ALL_TEACHERS, DEFAULT_TEACHER, Prompt


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

    def longest_for(self, teacher: str) -> int:
        """Tokens of the longest prompt that this teacher reads; 0 where it reads none."""
        own = (p for p in self._prompts if p.is_scored_by(teacher))
        return max((len(p.ids_for(teacher)) for p in own), default=0)

    @cached_property
    def digest(self) -> str:
        """Changes with any turn of a prompt and with the number of prompts."""
        return _digest(self._identity(prompt) for prompt in self._prompts)

    def _identity(self, prompt: Prompt) -> tuple[Any, ...]:
        # What is as in sets from before there was a choice says nothing, so that runs go on.
        is_default = prompt.teacher in (DEFAULT_TEACHER, ALL_TEACHERS)
        length = 4 if prompt.context else 2 if is_default else 3
        return (prompt.text, prompt.answer, prompt.teacher, prompt.context)[:length]

    @cached_property
    def teachers_digest(self) -> str:
        """Changes with anything that a teacher reads in the place of a prompt, and with who scores
        all; empty where there is nothing of both."""
        told = [(p.teacher == ALL_TEACHERS, p.teacher_ids) for p in self._prompts]
        if not any(is_all or own for is_all, own in told):
            return ""
        return _digest(
            (is_all, {name: _digest_of_ids(ids) for name, ids in own.items()})
            for is_all, own in told
        )

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


def _digest_of_ids(ids: TokenIds) -> str:
    return hashlib.sha256(array("I", ids).tobytes()).hexdigest()


def load_prompts(
    data: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    teachers: Sequence[str] = (DEFAULT_TEACHER,),
    *,
    rows: Iterable[Row] | None = None,
    read_by_teachers: PromptsOfTeachers | None = None,
    max_reference_length: int | None = None,
) -> PromptSet:
    """`teachers`: names that lines may have under `data.teacher_key`, the one of lines without a
    name first; `rows`: of a built-in task, where `data.prompts` names one; `read_by_teachers`: what
    they are shown; `max_reference_length`, in tokens: every prompt needs a reference answer under
    `data.response_key`, at most so long.

    Raises:
        ConfigError: a file that is missing or empty, or a line that cannot be used (which one).
    """
    if rows is None:
        rows = prompt_rows(Path(data.prompts), data, teachers)
    else:
        rows = (row._replace(teacher=teachers[0]) for row in rows)
    encoder = PromptEncoder(data, tokenizer)
    references = None
    if max_reference_length is not None:
        references = _References(data, tokenizer, max_reference_length)
    prompts: list[Prompt] = []
    special = SpecialTexts(tokenizer)
    num_cut = 0
    shown = read_by_teachers or PromptsOfTeachers()
    for row in rows:
        prompts.append(encoder.prompt(len(prompts), row, shown.ids(row)))
        special.look_at(row.where, (turn.content for turn in prompts[-1].turns))
        num_cut += row.is_cut
        if references is not None:
            references.add(row)
    if not prompts:
        raise ConfigError(f"data.prompts={data.prompts}: no prompts in it.")
    shown.check()
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


class _References:
    """Reference answers in tokens, taken row by row."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, max_length: int) -> None:
        self._key = data.response_key
        self._tokenizer = tokenizer
        self._share = shared_ids(tokenizer)
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
