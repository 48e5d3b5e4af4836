"""A recording as one HTML file that needs nothing else. In: a TokenRecord. Out: the page's text.

The page may run its own script and nothing else: no text of a model can become one, nothing is
fetched. Its data are JSON; columns.py says how columns of numbers stand in it.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_eopd.tokens.record import NOTABLE_KL, SIGNALS, TOP, About, TokenRecord
from megatron_eopd.viewing.columns import NATS, encode
from megatron_eopd.viewing.summary import Summary, has_gate, lower_bounds, summarize

COLOURS = (
    "teacher_entropy",
    "gate",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "engine_mismatch",
)
"""Signals that colour tokens, in the order of their keys."""
MOST_ALTERNATIVES = 200_000
"""Tokens with alternatives on one page; a thousand take some 60 kB."""
FINE = {"engine_mismatch": 1e-6}
"""Steps of signals whose values are small."""
SCRIPTS = ("data.js", "visible.js", "colours.js", "panel.js", "responses.js", "head.js", "page.js")
HERE = Path(__file__).parent


class Side(NamedTuple):
    """A run whose responses a page shows."""

    name: str
    about: About
    num_responses: int


def page_html(
    record: TokenRecord,
    sides: Sequence[Side],
    signal: str = COLOURS[0],
    most: int | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """`sides`: whose the responses are, in their order; `signal`: the colour to begin with;
    `most`: tokens with alternatives, MOST_ALTERNATIVES unless told; `links`: text → address of
    other pages."""
    kept_G = most_unsure(record, MOST_ALTERNATIVES if most is None else most)
    data = {
        "sides": [
            side._asdict()
            | {
                "about": _told(side.about),
                "lower_bounds": lower_bounds(side.about),
                "has_gate": has_gate(side.about),
            }
            for side in sides
        ],
        "links": dict(links or {}),
        "signals": {name: signal._asdict() for name, signal in SIGNALS.items()},
        "colours": COLOURS,
        "signal": signal,
        "top": TOP,
        "notable_kl": NOTABLE_KL,
        "summary": summarize(record)._asdict(),
        "alternatives_kept": int(kept_G.sum()),
        "prompts": [prompt._asdict() | {"ids": None} for prompt in record.prompts],
        "prompt_lengths": [len(prompt.ids) for prompt in record.prompts],
        "responses": [response._asdict() for response in record.responses],
        "columns": _columns(record, kept_G),
    }
    own = summarize(record, sides[0].num_responses)  # for the index, which has a row of each run
    return _filled(_title(sides), own, data)


def _told(about: About) -> dict[str, Any]:
    """JSON has no infinite threshold."""
    threshold = about.threshold if math.isfinite(about.threshold) else None
    return asdict(about) | {"threshold": threshold}


def most_unsure(record: TokenRecord, most: int) -> np.ndarray:
    """bool [G]: whose alternatives a page keeps. Those where the teacher's entropy is highest."""
    rows = len(record.top_rows_G)
    kept_G = np.ones(rows, bool)
    if rows > most:
        entropy_G = np.nan_to_num(record.signals["teacher_entropy"][record.top_rows_G], nan=-1.0)
        kept_G[np.argsort(-entropy_G, kind="stable")[most:]] = False
    return kept_G


def _columns(record: TokenRecord, kept_G: np.ndarray) -> dict[str, Any]:
    ids = sorted(record.pieces)
    contents = [record.pieces[i].content for i in ids]
    top_ids_KG = record.top_ids_GK[kept_G].T.astype(np.float64)
    prompt_ids = [i for prompt in record.prompts for i in prompt.ids]
    signals = {
        name: encode(values_T, FINE.get(name, NATS)) for name, values_T in record.signals.items()
    }
    return signals | {
        "ids": encode(record.ids_T),
        "student_rank": encode(record.student_rank_T),
        "teacher_rank": encode(record.teacher_rank_T),
        # Rising: their differences are small.
        "top_rows": encode(np.diff(record.top_rows_G[kept_G], prepend=0)),
        "top_ids": encode(np.where(top_ids_KG < 0, np.nan, top_ids_KG)),
        "top_student_logprobs": encode(record.top_student_logprobs_GK[kept_G].T, NATS),
        "top_teacher_logprobs": encode(record.top_teacher_logprobs_GK[kept_G].T, NATS),
        "prompt_ids": encode(np.array(prompt_ids)),
        "piece_ids": encode(np.array(ids)),
        "piece_lengths": encode(np.array([len(content) for content in contents])),
        "piece_bytes": encode(np.frombuffer(b"".join(contents), np.uint8)),
        "piece_special": encode(np.array([record.pieces[i].is_special for i in ids])),
    }


def _title(sides: Sequence[Side]) -> str:
    about = sides[0].about
    what = f"evaluation {about.iteration}, {about.task}" if about.task else f"{about.iteration}"
    return f"{what} · {' and '.join(side.name for side in sides)}"


def _filled(title: str, summary: Summary, data: Mapping[str, Any]) -> str:
    script = '"use strict";\n' + "\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    style = (HERE / "page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # ASCII, and no tag can begin in it: neither a comment nor an end of the script.
    in_json = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    parts = {
        "title": html.escape(title),
        "summary": html.escape(json.dumps(summary._asdict())),
        "digest": digest,
        "style": style,
        "data": in_json,
        "script": script,
    }
    parts["bytes"] = str(len(in_json) + len(script.encode()) + len(style.encode()))
    template = (HERE / "page.html").read_text("utf-8")
    # In one pass: what is put in is not looked through again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
