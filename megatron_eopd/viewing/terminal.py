"""A recording as lines for a terminal. In: a TokenRecord. Out: text.

With colours, a token's background is a signal and gated tokens are underlined; without, gated
tokens stand in [ ]. Of the models' text only visible.py's parts are printed.
"""

import os
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple, TextIO

import numpy as np

from megatron_eopd.tokens.record import SIGNALS, TOP, RecordedResponse, TokenRecord
from megatron_eopd.viewing.summary import Mean, has_gate, lower_bounds, mean_of, summarize
from megatron_eopd.viewing.visible import Reader, plain

PLAIN = (None, 17, 24, 30, 36, 71, 143, 221)
SIGNED = (39, 26, 18, None, 94, 130, 208)
"""Of xterm's 256 colours, for rising values; None: the terminal's own."""
LIGHT = {36, 39, 71, 143, 208, 221}
"""Of them, those on which black can be read."""
RESET = "\x1b[0m"
WORST = 5
NAME_WIDTH = 18
"""Columns of a token's name in a table of likely tokens."""
LEAST_TOPS = {"engine_mismatch": 1e-3}
"""Nats that have the last colour at least, as in colours.js: what is below them is rounding."""
UNKNOWN = Mean(None, 0)


class Choice(NamedTuple):
    signal: str
    has_colour: bool
    limit: int
    """Responses."""
    width: int = 80
    """Columns of the terminal."""


def wants_colour(stream: TextIO) -> bool:
    """https://no-color.org and https://force-color.org, of which the first wins."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def text_form(record: TokenRecord, run: str, choice: Choice) -> Iterator[str]:
    """Lines, the head first."""
    yield from (_wrapped(line, choice) for line in _head(record, run))
    yield _legend(record, choice)
    prompt = None
    for n, response in enumerate(record.responses[: choice.limit]):
        if response.prompt != prompt:
            prompt = response.prompt
            yield ""
            yield from (_wrapped(line, choice) for line in _prompt(record, prompt))
        yield from ("", _wrapped(_facts(record, n), choice), _tokens(record, n, choice))
    left = len(record.responses) - choice.limit
    if left > 0:
        yield f"\n… {left} more responses: --limit {len(record.responses)}"
    yield ""
    yield from _worst(record, choice)


def _head(record: TokenRecord, run: str) -> Iterator[str]:
    about, summary = record.about, summarize(record)
    what = f"evaluation {about.iteration}, {about.task}" if about.task else f"{about.iteration}"
    yield plain(f"{run}, {about.kind if not about.task else 'recording of'} {what}")
    teachers = ", ".join(about.teachers.values())
    threshold = f"{about.threshold} nats" if np.isfinite(about.threshold) else "none"
    gate = f"τ = {threshold}" if has_gate(about) else "no gate"
    yield plain(f"{about.objective}, {gate}, {teachers} → {about.student}")
    yield (
        f"{summary.num_responses} responses to {summary.num_prompts} prompts, "
        f"{summary.num_tokens:,} tokens, {summary.num_truncated} cut off, "
        f"{summary.num_references} references"
    )
    means = {name: Mean(summary.means[name], summary.num_infinite[name]) for name in SIGNALS}
    known = (name for name, mean in means.items() if mean != UNKNOWN)
    yield "means: " + ", ".join(_told_mean(record, name, means[name]) for name in known)


def _prompt(record: TokenRecord, prompt: int) -> Iterator[str]:
    told = record.prompts[prompt]
    answer = f" (answer {plain(told.answer)})" if told.answer else ""
    yield f"── prompt {told.index}{answer}"
    yield from (plain(line) for line in told.text.split("\n"))
    if told.read_by_teacher:
        yield "── what the teacher reads in its place"
        yield from (plain(line) for line in told.read_by_teacher.split("\n"))


def _facts(record: TokenRecord, n: int) -> str:
    response = record.responses[n]
    rows = slice(record.starts[n], record.starts[n + 1])
    facts = [f"{response.length} tokens", *_marks(response)]
    for name in ("gate", "reverse_kl", "forward_kl"):
        facts.append(_told_mean(record, name, mean_of(record.signals[name][rows])))
    return f"─ sample {response.sample_index}: {', '.join(facts)}"


def _marks(response: RecordedResponse) -> list[str]:
    marks = ["cut off"] if response.finish_reason == "length" else []
    marks += ["reference"] if response.source == "reference" else []
    return marks + ([plain(response.verdict)] if response.verdict else [])


def _tokens(record: TokenRecord, n: int, choice: Choice) -> str:
    """The response, on as many lines as it has, and as the terminal's width asks for."""
    reader, shown, column = Reader(), [], 0
    top = _top(record, choice.signal)
    for t in range(record.starts[n], record.starts[n + 1]):
        parts = reader.read(record.pieces[int(record.ids_T[t])])
        text = "".join(f"{part.text}\n" if part.kind == "newline" else part.text for part in parts)
        begin, end = _signs(record, t, top, choice)
        lines = text.split("\n")
        width = _columns(lines[0]) + (0 if choice.has_colour else len(begin + end))
        if column and column + width > choice.width:
            shown.append("\n")
            column = 0
        column = column + width if len(lines) == 1 else _columns(lines[-1])
        # Line by line: a background that goes on over the end of a line fills it.
        shown.append("\n".join(f"{begin}{line}{end}" if line else "" for line in lines))
    return "".join(shown)


def _signs(record: TokenRecord, t: int, top: float, choice: Choice) -> tuple[str, str]:
    """What stands before a token and behind it."""
    is_gated = has_gate(record.about) and record.signals["gate"][t] > 0
    if not choice.has_colour:
        return ("[", "]") if is_gated else ("", "")
    begin = _style(choice.signal, float(record.signals[choice.signal][t]), top, is_gated)
    return begin, RESET if begin else ""


def _columns(text: str) -> int:
    """Of a terminal, in which East Asian characters are two wide, and marks on others have none."""
    widths = {"W": 2, "F": 2}
    return sum(
        0 if unicodedata.combining(c) else widths.get(unicodedata.east_asian_width(c), 1)
        for c in text
    )


def _wrapped(line: str, choice: Choice) -> str:
    return textwrap.fill(line, choice.width, break_on_hyphens=False)


def _style(signal: str, value: float, top: float, is_gated: bool) -> str:
    codes = ["4"] if is_gated else []
    colour = None if np.isnan(value) else _colour(signal, value, top)
    if colour is not None:
        codes += [f"48;5;{colour}", "38;5;16" if colour in LIGHT else "38;5;231"]
    return f"\x1b[{';'.join(codes)}m" if codes else ""


def _colour(signal: str, value: float, top: float) -> int | None:
    if signal == "engine_mismatch":
        part = (min(max(value / top, -1.0), 1.0) + 1) / 2
        return SIGNED[round(part * (len(SIGNED) - 1))]
    part = min(max(value / top, 0.0), 1.0)
    return PLAIN[round(part * (len(PLAIN) - 1))]


def _top(record: TokenRecord, signal: str) -> float:
    """The value that has the last colour: few tokens are beyond it."""
    sizes = np.abs(record.signals[signal])
    finite = sizes[np.isfinite(sizes)]
    least = LEAST_TOPS.get(signal, 1e-6)
    return max(float(np.quantile(finite, 0.995)), least) if len(finite) else 1.0


def _legend(record: TokenRecord, choice: Choice) -> str:
    is_gated, label = has_gate(record.about), _label(record, choice.signal)
    if not choice.has_colour:
        brackets = "[ ]: gate > 0; " if is_gated else ""
        told = f"{brackets}the largest by {label} are listed below; colours: FORCE_COLOR=1"
        return _wrapped(told, choice)
    top, unit = _top(record, choice.signal), SIGNALS[choice.signal].unit
    low = -top if choice.signal == "engine_mismatch" else 0.0
    swatches = "".join(
        f"{_style(choice.signal, low + (top - low) * k / 7, top, False)}  {RESET}" for k in range(8)
    )
    underlined = "; underlined: gate > 0" if is_gated else ""
    return f"{label}: {low:.2g} {swatches} {top:.2g} {unit}{underlined}"


def _worst(record: TokenRecord, choice: Choice) -> Iterator[str]:
    """The tokens at which the signal is largest, with what the models would have said."""
    values_T = np.nan_to_num(np.abs(record.signals[choice.signal]), nan=-1.0)
    worst = [int(t) for t in np.argsort(-values_T, kind="stable")[:WORST] if values_T[t] >= 0]
    if not worst:
        return
    label, tokens = _label(record, choice.signal), len(values_T)
    yield _wrapped(f"── the {len(worst)} largest by {label}, of {tokens:,} tokens", choice)
    for t in worst:
        n = int(np.searchsorted(record.starts, t, side="right")) - 1
        response = record.responses[n]
        place = (
            f"prompt {record.prompts[response.prompt].index}, sample {response.sample_index}, "
            f"token {t - record.starts[n]}"
        )
        figures = ", ".join(
            _told(record, name, float(record.signals[name][t]))
            for name in ("teacher_entropy", "reverse_kl", "forward_kl")
        )
        yield _wrapped(f"{_name(record, int(record.ids_T[t]))}  {place}: {figures}", choice)
        yield from _alternatives(record, t)


def _alternatives(record: TokenRecord, t: int) -> Iterator[str]:
    """Both models' lists side by side, with the teacher's p and the student's q in each."""
    row = int(np.searchsorted(record.top_rows_G, t))
    if row == len(record.top_rows_G) or record.top_rows_G[row] != t:
        yield "    no alternatives were kept here"
        return
    lists = top_fives(record, row)
    heads = [_cell(f"{who}'s top {TOP}", "p", "q") for who in ("teacher", "student")]
    yield _joined(heads)
    if not any(lists):
        yield "    unknown"
    for pair in zip_longest(*lists):
        yield _joined([_cell_of(record, row, k) for k in pair])


def _joined(cells: Sequence[str]) -> str:
    return ("    " + "  ".join(cells)).rstrip()


def _cell_of(record: TokenRecord, row: int, k: int | None) -> str:
    if k is None:
        return _cell("", "", "")
    logprobs = (record.top_teacher_logprobs_GK[row, k], record.top_student_logprobs_GK[row, k])
    return _cell(_name(record, int(record.top_ids_GK[row, k])), *map(_share, logprobs))


def _cell(name: str, p: str, q: str) -> str:
    if _columns(name) > NAME_WIDTH:
        while _columns(name) >= NAME_WIDTH:
            name = name[:-1]
        name += "…"
    return f"{name}{' ' * (NAME_WIDTH - _columns(name))}{p:>8}{q:>8}"


def top_fives(record: TokenRecord, row: int) -> tuple[list[int], list[int]]:
    """Columns of the teacher's most probable tokens, and of the student's, which are in both
    lists: its own leaves out what the teacher's has."""
    ids_K, student_K = record.top_ids_GK[row], record.top_student_logprobs_GK[row]
    there = [k for k in range(2 * TOP) if ids_K[k] >= 0]
    known = [k for k in there if not np.isnan(student_K[k])]
    by_student = sorted(known, key=lambda k: -student_K[k])
    return [k for k in there if k < TOP], by_student[:TOP]


def _name(record: TokenRecord, token: int) -> str:
    text = "".join(part.text for part in Reader().read(record.pieces[token]))
    return f"«{text}»"


def _share(logprob: float) -> str:
    """As wide as a column of the table."""
    if np.isnan(logprob):
        return "unknown"
    probability = float(np.exp(logprob))
    return "< 0.001" if 0 < probability < 0.0005 else f"{probability:.3f}"


def _label(record: TokenRecord, name: str) -> str:
    bound = ", at least" if name in lower_bounds(record.about) else ""
    return f"{SIGNALS[name].label}{bound}"


def _told(record: TokenRecord, name: str, value: float) -> str:
    is_bound = name in lower_bounds(record.about) and np.isfinite(value)
    return f"{SIGNALS[name].label} {'at least ' if is_bound else ''}{_figure(name, value)}"


def _told_mean(record: TokenRecord, name: str, mean: Mean) -> str:
    if name == "gate" and not has_gate(record.about):
        return "no gate"
    if not mean.num_infinite:
        return _told(record, name, np.nan if mean.mean is None else mean.mean)
    is_known = mean.mean is not None
    told = _told(record, name, mean.mean) if is_known else f"{SIGNALS[name].label} none finite"
    return f"{told} ({mean.num_infinite:,} infinite)"


def _figure(name: str, value: float) -> str:
    if np.isnan(value):
        return "unknown"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.1e}" if name == "engine_mismatch" else f"{value:.3f}"
