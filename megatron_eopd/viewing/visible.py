"""Tokens as text in which everything can be seen. In: the bytes of tokens, one after the other.
Out: parts of text, none of which can steer a terminal or turn the direction of a line.

visible.js does the same in the browser, by the same rules.
"""

import unicodedata
from collections.abc import Iterator
from typing import Literal, NamedTuple

from megatron_eopd.tokens.record import Piece

INVISIBLE = set("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
"""Letters and marks by their category, which no font shows."""


class Part(NamedTuple):
    kind: Literal["text", "mark", "newline", "hex", "special"]
    text: str


class Reader:
    """Bytes of tokens into characters. A character that several tokens share is shown at the one
    that completes it; the others show the bytes that they add."""

    def __init__(self) -> None:
        self._open = b""  # the begin of a character, of this token and of those before it

    def read(self, piece: Piece) -> list[Part]:
        if piece.is_special:
            self._open = b""
            return [Part("special", _special(piece.content))]
        parts: list[Part] = []
        text, own = "", 0  # own: how many of the open bytes are this token's

        def show_hex(content: bytes) -> None:
            nonlocal text
            parts.extend(_text_parts(text))
            text = ""
            parts.append(Part("hex", f"⟨{content.hex(' ').upper()}⟩"))

        for byte in piece.content:
            if self._open and not _goes_on(self._open, byte):
                if own:
                    show_hex(self._open[-own:])
                self._open, own = b"", 0
            if not self._open and _length(byte) == 0:
                show_hex(bytes([byte]))
                continue
            self._open, own = self._open + bytes([byte]), own + 1
            if len(self._open) == _length(self._open[0]):
                text += self._open.decode()
                self._open, own = b"", 0
        parts.extend(_text_parts(text))
        text = ""
        if own:
            show_hex(self._open[-own:])
        return _joined(parts)


def plain(text: str) -> str:
    """Text of prompts and names, in one line of what can be seen."""
    parts = Reader().read(Piece(text.encode(errors="replace"), is_special=False))
    return "".join(part.text for part in parts)


def _length(first: int) -> int:
    """Bytes of the character that one begins; 0 of one that begins none."""
    if first < 0x80:
        return 1
    return 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 * (0xF0 <= first < 0xF5)


def _goes_on(begin: bytes, byte: int) -> bool:
    """Whether UTF-8 lets this byte follow: nothing overlong, no surrogates, at most 10FFFF."""
    low, high = 0x80, 0xBF
    if len(begin) == 1:
        low = {0xE0: 0xA0, 0xF0: 0x90}.get(begin[0], low)
        high = {0xED: 0x9F, 0xF4: 0x8F}.get(begin[0], high)
    return low <= byte <= high


def _special(content: bytes) -> str:
    """⟨|im_end|⟩ of <|im_end|>."""
    name = "".join(
        part.text for char in content.decode(errors="replace") for part in _text_parts(char)
    )
    return f"⟨{name[1:-1] if name.startswith('<') and name.endswith('>') else name}⟩"


def _text_parts(text: str) -> Iterator[Part]:
    for char in text:
        if char == "\n":
            yield Part("newline", "↵")
        elif char == "\t":
            yield Part("mark", "⇥")
        elif is_hidden(char):
            yield Part("mark", mark_of(char))
        else:
            yield Part("text", char)


def is_hidden(char: str) -> bool:
    """Controls, formats such as marks of direction, separators, spaces other than the space."""
    category = unicodedata.category(char)
    return (category[0] in "CZ" and char != " ") or char in INVISIBLE


def mark_of(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"[U+{code:04X}]"


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbours of plain text, and of bytes, as one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last and part.kind == last.kind == "text":
            joined[-1] = Part("text", last.text + part.text)
        elif last and part.kind == last.kind == "hex":
            joined[-1] = Part("hex", f"{last.text[:-1]} {part.text[1:]}")
        else:
            joined.append(part)
    return joined
