"""One prompt as a model reads it, for a look before hours of training. In: its ids. Out: text."""

import re
import unicodedata
from collections.abc import Sequence

from megatron_eopd.data.ends import name_tokens
from megatron_eopd.data.tokenizer_base import Tokenizer
from megatron_eopd.errors import ConfigError

_ALL_IDS = 64
_HEAD, _TAIL = 40, 16
_SPACES = re.compile(r"^ +| +$| {2,}", re.MULTILINE)


def render_preview(tokenizer: Tokenizer, prompt_ids: Sequence[int], who: str = "student") -> str:
    """Decoded with special tokens, the ids, and what ends an answer; many lines, the last without
    a line feed. For a teacher the student's ids, by its own tokenizer."""
    text = show_white_space(tokenizer.show(prompt_ids))
    return "\n".join(
        (
            f"what the {who} reads, {len(prompt_ids)} tokens by {tokenizer.path}:",
            *(f"  | {line}" for line in text.split("\n")),
            f"  ids: {_shorten(prompt_ids)}",
            f"  an answer ends with: {_ends(tokenizer)}",
        )
    )


def _ends(tokenizer: Tokenizer) -> str:
    try:
        return name_tokens(tokenizer, tokenizer.stop_ids)
    except ConfigError:  # a tool shows prompts of a tokenizer that no run was given yet
        return "nothing yet; a run will want rollout.stop_token_ids"


def show_white_space(text: str) -> str:
    """↵ before each line feed, → for tabs, · for spaces at the ends of lines and for several in a
    row, and characters that show nothing, or look like a space, as escapes."""
    spaces_shown = _SPACES.sub(lambda match: "·" * len(match[0]), text)
    return "".join(map(_visible, spaces_shown))


def _visible(character: str) -> str:
    if character in "\n\t":
        return {"\n": "↵\n", "\t": "→"}[character]
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs")
    return character.encode("unicode_escape").decode() if hidden and character != " " else character


def _shorten(ids: Sequence[int]) -> str:
    if len(ids) <= _ALL_IDS:
        return " ".join(map(str, ids))
    left_out = len(ids) - _HEAD - _TAIL
    head, tail = (" ".join(map(str, part)) for part in (ids[:_HEAD], ids[-_TAIL:]))
    return f"{head} … {left_out} more … {tail}"
