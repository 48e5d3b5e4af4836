r"""The answer that a text boxes. In: a text. Out: what its last \boxed holds, or None.

The last box counts, and no other: where it is empty or was never closed, the text has no answer,
whatever it boxed before.
"""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_OPENING = re.compile(r"\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_END_OF_FORMULA = re.compile(r"\$|\\\)|\\\]|\n|\.\s|\Z")


def has_box(text: str) -> bool:
    return _BOX.search(text) is not None


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{…} or \fbox{…}; of `\boxed 5`, as the MATH data writes it,
    what stands up to the formula's end. None without a box, or where the last is empty or open.

    Of nested boxes the inner one is the last. The text is read once: each box starts behind the
    one before, and braces are counted from the last one only.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    last = boxes[-1]
    opening = _OPENING.match(text, last.end())
    if opening is None:
        content = text[last.end() : _END_OF_FORMULA.search(text, last.end()).start()]
    else:
        closing = _closing_brace(text, opening.end())
        content = text[opening.end() : closing] if closing is not None else ""
    return content.strip() or None


def _closing_brace(text: str, start: int) -> int | None:
    r"""Where the brace that opened before `start` is closed. \{ and \} are characters."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
