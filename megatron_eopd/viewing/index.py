"""RUN/view/index.html: which pages there are, and of what. In: the summaries in the pages."""

import glob
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from megatron_eopd.viewing.page import HERE
from megatron_eopd.viewing.recordings import Recording
from megatron_eopd.viewing.summary import Summary

HEAD_BYTES = 16_384
"""Of a page, in which its summary stands."""
COLUMNS = (
    *("recording", "prompts", "responses", "tokens", "cut off", "right", "gate", "reverse KL"),
    *("forward KL", "teacher entropy", "student entropy", "page"),
)


def summary_of(page: Path) -> Summary | None:
    """None of what is no page of this version."""
    try:
        with page.open(encoding="utf-8", errors="replace") as file:
            found = re.search(r'<meta name="summary" content="([^"]*)">', file.read(HEAD_BYTES))
        return Summary(**json.loads(html.unescape(found[1]))) if found else None
    except (OSError, ValueError, TypeError):
        return None


def index_html(run: str, recordings: Sequence[Recording], output: Path) -> str:
    """Those that have a page in `output`, with their comparisons."""
    rows = []
    for recording in recordings:
        page = output / f"{recording.name}.html"
        summary = summary_of(page)
        if summary is not None:
            links = [_link(page, recording.where), *_comparisons(recording, output)]
            cells = (" · ".join(links), *_cells(summary, page.stat().st_size))
            rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    parts = {
        "run": html.escape(run),
        "head": head,
        "rows": "\n".join(f"<tr>{row}</tr>" for row in rows),
        "style": (HERE / "page.css").read_text("utf-8"),
    }
    template = (HERE / "index.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _link(page: Path, text: str) -> str:
    return f'<a href="{quote(page.name)}">{html.escape(text)}</a>'


def _comparisons(recording: Recording, output: Path) -> list[str]:
    """Links to what shows another run beside it."""
    begin = f"{recording.name}-with-"
    pages = sorted(output.glob(f"{glob.escape(begin)}*.html"))
    return [_link(page, f"with {page.stem.removeprefix(begin)}") for page in pages]


def _cells(summary: Summary, size: int) -> list[str]:
    def mean(name: str, form: str = ".3f") -> str:
        value = summary.means.get(name)
        return "–" if value is None else f"{value:{form}}"

    right = f"{summary.num_right} of {summary.num_graded}" if summary.num_graded else "–"
    return [
        *(f"{n:,}" for n in (summary.num_prompts, summary.num_responses, summary.num_tokens)),
        f"{summary.num_truncated / max(summary.num_responses, 1):.0%}",
        *(right, mean("gate", ".1%"), mean("reverse_kl"), mean("forward_kl")),
        *(mean("teacher_entropy"), mean("student_entropy"), f"{size / 1e6:.1f} MB"),
    ]
