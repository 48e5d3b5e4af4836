"""A recording as lines for a terminal. In: a TokenRecord. Out: text.

With colours, a token's background is a signal and gated tokens are underlined; without, gated
tokens stand in [ ]. Of the models' text only visible.py's parts are printed.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple, TextIO

import numpy as np

from megatron_eopd.tokens.record import SIGNALS, TOP, RecordedResponse, TokenRecord
from megatron_eopd.viewing.summary import Mean, lower_bounds, mean_of, summarize
from megatron_eopd.viewing.visible import Reader, plain

PLAIN = (None, 17, 24, 30, 36, 71, 143, 221)
SIGNED = (39, 26, 18, None, 94, 130, 208)
"""Of xterm's 256 colours, for rising values; None: the terminal's own."""
LIGHT = {36, 39, 71, 143, 208, 221}
"""Of them, those on which black can be read."""
RESET = "\x1b[0m"
WORST = 5
UNKNOWN = Mean(None, 0)


class Choice(NamedTuple):
    signal: str
    has_colour: bool
    limit: int
    """Responses."""


def wants_colour(stream: TextIO) -> bool:
    """https://no-color.org"""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def text_form(record: TokenRecord, run: str, choice: Choice) -> Iterator[str]:
    """Lines, the head first."""
    yield from _head(record, run)
    if choice.has_colour:
        yield _legend(record, choice)
    prompt = None
    for n, response in enumerate(record.responses[: choice.limit]):
        if response.prompt != prompt:
            prompt = response.prompt
            yield from _prompt(record, prompt)
        yield from ("", _facts(record, n), _tokens(record, n, choice))
    left = len(record.responses) - choice.limit
    if left > 0:
        yield f"\n… {left} more responses: --limit {len(record.responses)}"
    yield from _worst(record, choice)


def _head(record: TokenRecord, run: str) -> Iterator[str]:
    about, summary = record.about, summarize(record)
    what = f"evaluation {about.iteration}, {about.task}" if about.task else f"{about.iteration}"
    yield plain(f"{run}, {about.kind if not about.task else 'recording of'} {what}")
    teachers = ", ".join(about.teachers.values())
    threshold = f"{about.threshold} nats" if np.isfinite(about.threshold) else "none"
    yield plain(f"{about.objective}, τ = {threshold}, {teachers} → {about.student}")
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
    yield f"\n── prompt {told.index}{answer}"
    yield "\n".join(plain(line) for line in told.text.split("\n"))


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
    """The response, on as many lines as it has."""
    reader, shown = Reader(), []
    values_T, top = record.signals[choice.signal], _top(record, choice.signal)
    for t in range(record.starts[n], record.starts[n + 1]):
        parts = reader.read(record.pieces[int(record.ids_T[t])])
        text = "".join(f"{part.text}\n" if part.kind == "newline" else part.text for part in parts)
        is_gated = record.signals["gate"][t] > 0
        begin, end = ("[", "]") if is_gated else ("", "")
        if choice.has_colour:
            begin = _style(choice.signal, float(values_T[t]), top, is_gated)
            end = RESET if begin else ""
        # Line by line: a background that goes on over the end of a line fills it.
        shown.append("\n".join(f"{begin}{line}{end}" if line else "" for line in text.split("\n")))
    return "".join(shown)


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
    return max(float(np.quantile(finite, 0.995)), 1e-6) if len(finite) else 1.0


def _legend(record: TokenRecord, choice: Choice) -> str:
    top, unit = _top(record, choice.signal), SIGNALS[choice.signal].unit
    low = -top if choice.signal == "engine_mismatch" else 0.0
    swatches = "".join(
        f"{_style(choice.signal, low + (top - low) * k / 7, top, False)}  {RESET}" for k in range(8)
    )
    scale = f"{low:.2g} {swatches} {top:.2g} {unit}"
    return f"{_label(record, choice.signal)}: {scale}; underlined: gate > 0"


def _worst(record: TokenRecord, choice: Choice) -> Iterator[str]:
    """The tokens at which the signal is largest, with what the models would have said."""
    values_T = np.nan_to_num(np.abs(record.signals[choice.signal]), nan=-1.0)
    worst = [int(t) for t in np.argsort(-values_T, kind="stable")[:WORST] if values_T[t] >= 0]
    if not worst:
        return
    yield f"\n── the largest by {_label(record, choice.signal)}"
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
        yield f"{_name(record, int(record.ids_T[t]))}  {place}: {figures}"
        yield from _alternatives(record, t)


def _alternatives(record: TokenRecord, t: int) -> Iterator[str]:
    row = int(np.searchsorted(record.top_rows_G, t))
    if row == len(record.top_rows_G) or record.top_rows_G[row] != t:
        yield "    no alternatives were kept here"
        return
    for who, places in zip(("teacher", "student"), top_fives(record, row), strict=True):
        told = [
            f"{_name(record, int(record.top_ids_GK[row, k]))} "
            f"p {_share(record.top_teacher_logprobs_GK[row, k])} "
            f"q {_share(record.top_student_logprobs_GK[row, k])}"
            for k in places
        ]
        yield f"    top of the {who}: {' · '.join(told) or 'unknown'}"


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
    return "unknown" if np.isnan(logprob) else f"{np.exp(logprob):.3f}"


def _label(record: TokenRecord, name: str) -> str:
    bound = ", at least" if name in lower_bounds(record.about) else ""
    return f"{SIGNALS[name].label}{bound}"


def _told(record: TokenRecord, name: str, value: float) -> str:
    is_bound = name in lower_bounds(record.about) and np.isfinite(value)
    return f"{SIGNALS[name].label} {'at least ' if is_bound else ''}{_figure(name, value)}"


def _told_mean(record: TokenRecord, name: str, mean: Mean) -> str:
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
