"""What a person should look at in a set of prompts. In: rows as they are encoded. Out: warnings.

None of this is wrong for certain, and none shows in the loss: a model reads other prompts than were
meant, or others on another day.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from megatron_eopd.data.tokenizer_base import Tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn

_DATE = "date_string"
"""The variable in which Llama 3's templates, and those made after them, take a date."""


class SpecialTexts:
    """Counts rows in whose own text a special token is spelled out: a tokenizer makes the token of
    it, as for a text that a template wrote. vLLM and transformers do the same."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode_response
        self._ids = tokenizer.special_tokens()
        self._bos = "" if tokenizer.bos_id is None else tokenizer.show([tokenizer.bos_id])
        # Longest first: where one spelling begins another, the shorter would hide the longer.
        spellings = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, spellings)) or "(?!)")
        self._count = 0
        self._first = ""

    def look_at(self, where: str, texts: Iterable[str]) -> None:
        """At the texts of one row."""
        found = next(filter(None, map(self._find, texts)), None)
        if found is not None:
            self._first = self._first or f"{where}, which has {found}"
            self._count += 1

    def _find(self, text: str) -> str | None:
        """The beginning of sequence in front is looked after elsewhere: it stands there once."""
        match = self._pattern.search(text, len(self._bos) * text.startswith(self._bos))
        is_token = match is not None and self._ids[match[0]] in self._encode(text)
        return match[0] if is_token else None

    def warnings(self, what: str = "prompts") -> list[str]:
        if not self._count:
            return []
        return [
            f"{self._count} {what} hold special tokens in their text, the first is {self._first}: "
            f"the model reads it as the token, not as its letters. Where that is not meant, take "
            f"it out or spell it otherwise."
        ]


def clock_warnings(tokenizer: Tokenizer, turns: Sequence[Turn], **options: Any) -> list[str]:
    """Where the chat template writes today's date into this chat: after midnight, or resumed, a run
    would ask otherwise."""

    def rendered(now: datetime, **more: Any) -> str | None:
        try:
            return tokenizer.render_chat(turns, strftime_now=now.strftime, **options, **more)
        except ConfigError:  # it reads no clock, or no such variable
            return None

    days = datetime(2001, 1, 1), datetime(2032, 12, 31)
    if rendered(days[0]) == rendered(days[1]):
        return []
    remedy = "Choose one that does not with data.chat_template_file"
    fixed = {} if _DATE in options else {_DATE: "26 Jul 2024"}
    if rendered(days[0], **fixed) == rendered(days[1], **fixed) is not None:
        remedy = f'Set data.chat_template_kwargs.{_DATE}, for example to "26 Jul 2024"'
    return [
        f"the chat template of {tokenizer.path} writes the day on which it is read into the "
        f"prompts, so that a run goes on with others tomorrow. {remedy}."
    ]
