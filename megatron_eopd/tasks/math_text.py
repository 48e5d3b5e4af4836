r"""One spelling for what is written in several ways. In: an answer in LaTeX or plain text. Out:
LaTeX with one form of fractions, spaces, signs and fonts, in which nothing has been computed.

Linear in the length of the text, which `MAX_LENGTH` bounds.
"""

import re

MAX_LENGTH = 2_000
"""Of an answer that is looked into. Longer ones are loops of a model, not answers."""

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑‒﹣－", "-"),
        **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009", " "),
        **dict.fromkeys("\u200a\u202f\u205f\u3000\t\n\r", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94) if chr(0x21 + i) != "-"},
        **{"。": ".", "、": ",", "¼": r"\frac{1}{4}", "½": r"\frac{1}{2}", "¾": r"\frac{3}{4}"},
        **{"×": r"\times ", "÷": "/", "⁄": "/", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*"},
        **{"π": r"\pi ", "∞": r"\infty ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp "},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
        **{"°": r"^\circ ", "º": r"^\circ ", "√": r"\sqrt", "…": r"\dots ", "′": "'"},
        **{"θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "φ": r"\phi "},
        **{c: f"^{{{d}}}" for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)},
        **{c: f"_{{{d}}}" for c, d in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)},
        **{"⟨": r"\langle ", "⟩": r"\rangle ", "“": '"', "”": '"', "’": "'"},
    }
)

_END = r"(?![a-zA-Z])"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\\[[\w.]*\]", r"\\\\"),
        (rf"\\(?:left|right|middle|[bB]igg?[lrm]?){_END}\s?\.?", ""),
        (rf"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it|sf){_END}\s?", ""),
        (r"\\(?:hspace|vspace|phantom)\*?\{[^{}]*\}", " "),
        (r"(?<!\\)\\[()\[\]]", ""),  # the signs of a formula, not line breaks before a bracket
        (r",\s*\\!\s*", ","),
        (r"(?<!\\)\\!", ""),
        (rf"(?<!\\)\\(?:[,;:> ]|q?quad{_END})|~", " "),
        (r"\{,\}", ","),
        (r"(?<!\\)\$", ""),
        (r"\\([%#&])", r"\1"),
        (rf"\\[dtc]frac{_END}", r"\\frac"),
        (rf"\\[dt]binom{_END}", r"\\binom"),
        (rf"\\le(?:q|qslant){_END}|<=", r"\\le "),
        (rf"\\ge(?:q|qslant){_END}|>=", r"\\ge "),
        (rf"\\lt{_END}", "<"),
        (rf"\\gt{_END}", ">"),
        (rf"\\neq{_END}", r"\\ne "),
        (rf"\\lbrace{_END}", r"\\{"),
        (rf"\\rbrace{_END}", r"\\}"),
        (rf"\\[lr]vert{_END}", "|"),
        (rf"\\(?:varnothing|O){_END}", r"\\emptyset "),
        (rf"\\(?:ldots|cdots|dotsc){_END}|\.\.\.", r"\\dots "),
        (rf"\\colon{_END}", ":"),
        (rf"\\(?:degree|degrees){_END}|\^\s*\{{\s*\\circ\s*\}}|\^\s*\\circ{_END}", r"^\\circ "),
        (r"\+/-", r"\\pm "),
        (r"\*\*", "^"),
        (r"(?<![a-zA-Z\\])(floor|ceil)\(([^()]*)\)", r"{\\l\1 \2\\r\1 }"),
        (r"(?<![a-zA-Z\\])sum_\(([^()]*)\)", r"\\sum_{\1}"),
    )
]

_TEXT_FONT = r"text|textbf|textit|textrm|textnormal|textsf|texttt|mbox|hbox"
_MATH_FONT = r"mathrm|mathbf|mathit|mathsf|mathnormal|boldsymbol|bm"
_FONT = re.compile(rf"\\(?:({_TEXT_FONT})|(?:{_MATH_FONT}))\s*\{{([^{{}}]*)\}}")
_PLAIN_FUNCTION = re.compile(
    r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|pi|infinity|theta|binom)(?![a-zA-Z])"
)
_ROOT_SIGN = re.compile(r"√\s*(\d+(?:\.\d+)?)")
_TEXT = re.compile(r"(\\text\{[^{}]*\})")
_ENDING = re.compile(r"(?:[\s.,;:]|(?<!\\)\\\\)+$")
_GROUPED_BY_SPACES = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d ])")


def tidy(answer: str) -> str:
    r"""Of `\dfrac12 \,\mathrm{cm}.` it is `\frac{1}{2} \text{cm}`."""
    text = _ROOT_SIGN.sub(r"\\sqrt{\1}", answer).translate(_CHARACTERS).strip("* ")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _FONT.sub(_plain_font, text)
    # Words are words within \text, functions outside of it.
    parts = [
        part if part.startswith(r"\text{") else _PLAIN_FUNCTION.sub(_function, part)
        for part in _TEXT.split(text)
    ]
    text = "".join(parts)
    for command, number in ((r"\frac", 2), (r"\binom", 2), (r"\sqrt", 1), ("^", 1)):
        text = _with_braces(text, command, number)
    text = _GROUPED_BY_SPACES.sub(lambda match: match[0].replace(" ", ","), text)
    text = _ENDING.sub("", " ".join(text.split()))
    return text.lstrip("=: ").strip()


def squeeze(tidied: str) -> str:
    """Equal for texts that differ in spaces and needless braces only. Between digits a space
    counts: 1 2 is not 12, and 1, 200 not 1,200."""
    text = re.sub(r"(?<![\d,]) | (?!\d)", "", tidied)
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)


def _plain_font(match: re.Match[str]) -> str:
    content = match[2].strip()
    if re.fullmatch(r"(?:\\\$)?[-+.,\d]*\d[-+.,\d]*", content) or (
        not match[1] and len(content) == 1
    ):
        return content
    if number := re.fullmatch(r"([-+]?[.,\d]*\d)\s*([^\d]+)", content):
        return rf"{number[1]} \text{{{number[2]}}}"
    return rf"\text{{{match[2]}}}"


def _function(match: re.Match[str]) -> str:
    name = {"infinity": "infty"}.get(match[1], match[1])
    return rf"\{name} "


def _with_braces(text: str, command: str, number: int) -> str:
    r"""`\frac12` → `\frac{1}{2}`, `\sqrt(x+1)` → `\sqrt{x+1}`, `2^(n-1)` → `2^{n-1}`."""
    pattern = re.compile(re.escape(command) + (_END if command.startswith("\\") else ""))
    # From the last: what stands behind a command is then done already, also in nested ones.
    for match in reversed(list(pattern.finditer(text))):
        end, arguments = match.end(), ""
        for _ in range(number):
            argument, end = _argument(text, end, command)
            arguments += argument
        text = text[: match.end()] + arguments + text[end:]
    return text


_ROOT_DEGREE = re.compile(r"\s*\[[^\[\]]*\]")
_TOKEN = re.compile(r"\s*(\\[a-zA-Z]+|\\.|.)", re.DOTALL)
_EXPONENT = re.compile(r"\s*([-+]?\d+)")


def _argument(text: str, start: int, command: str) -> tuple[str, int]:
    """One argument in braces, and where it ends; nothing where there is none."""
    degree = _ROOT_DEGREE.match(text, start) if command == r"\sqrt" else None
    before, start = (degree[0].strip(), degree.end()) if degree else ("", start)
    # In LaTeX x^10 is x¹0, which nobody means who writes it.
    if command == "^" and (exponent := _EXPONENT.match(text, start)):
        return f"{{{exponent[1]}}}", exponent.end()
    token = _TOKEN.match(text, start)
    if token is None or token[1] in tuple("}),]&^_") or token[1] == r"\circ":
        return before, start
    pair = {"{": "}", "(": ")"}.get(token[1])
    if pair and not (pair == ")" and command == r"\frac"):
        closing = _closing(text, token.end(), token[1], pair)
        if closing is None:
            return before, start
        return f"{before}{{{text[token.end() : closing].strip()}}}", closing + 1
    if token[1][0] == "\\" and text.startswith("{", token.end()):  # it has one of its own
        return before, start
    return f"{before}{{{token[1]}}}", token.end()


def _closing(text: str, start: int, opening: str, closing: str) -> int | None:
    depth = 1
    for position in range(start, len(text)):
        depth += {opening: 1, closing: -1}.get(text[position], 0)
        if depth == 0:
            return position
    return None
