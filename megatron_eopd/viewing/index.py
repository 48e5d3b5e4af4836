"""RUN/view/index.html: which pages there are, and of what. In: the summaries in the pages."""

import glob
import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from megatron_eopd.viewing.page import HERE
from megatron_eopd.viewing.recordings import Recording
from megatron_eopd.viewing.summary import Summary

HEAD_BYTES = 16_384
"""Of a page, in which its summary stands."""
BESIDE = "-with-"
"""In the name of a page, between the recording's and that of the run which is shown beside it."""
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
    """A row of each recording that has a page in `output`, be it beside another run alone."""
    rows, kind = [], ""
    for recording in recordings:
        pages = _pages_of(recording, output)
        if not pages:
            continue
        if recording.kind != kind:
            kind = recording.kind
            rows.append(f'<tr class="kind"><th colspan="{len(COLUMNS)}">{kind}</th></tr>')
        first, *cells = _links(recording, pages), *_cells(next(iter(pages.values())))
        own = _plain_page(recording, output)
        cells.append(_size(own) if own in pages else "–")
        rows.append(f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    parts = {
        "run": html.escape(run),
        "head": "".join(f"<th>{name}</th>" for name in COLUMNS),
        "rows": "\n".join(rows),
        "style": (HERE / "page.css").read_text("utf-8"),
    }
    template = (HERE / "index.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _plain_page(recording: Recording, output: Path) -> Path:
    return output / f"{recording.name}.html"


def _pages_of(recording: Recording, output: Path) -> dict[Path, Summary]:
    """The one of the recording alone first, then those with another run beside it."""
    begin = glob.escape(f"{recording.name}{BESIDE}")
    found = {}
    for page in (_plain_page(recording, output), *sorted(output.glob(f"{begin}*.html"))):
        summary = summary_of(page)
        # A task's name may be the begin of another one's.
        if summary is not None and summary.task == recording.task:
            found[page] = summary
    return found


def _links(recording: Recording, pages: Sequence[Path]) -> str:
    """The recording, and below it what it is shown beside."""
    plain, begin = f"{recording.name}.html", f"{recording.name}{BESIDE}"
    text = html.escape(recording.where)
    lines = []
    for page in pages:
        if page.name == plain:
            text = _link(page, recording.where)
        else:
            link = _link(page, f"beside {page.stem.removeprefix(begin)}")
            lines.append(f"<small>{link}, {_size(page)}</small>")
    return "".join((text, *lines))


def _link(page: Path, text: str) -> str:
    return f'<a href="{address(page.name)}">{html.escape(text)}</a>'


def address(name: str) -> str:
    """Of a file in the same folder; names of files may be no text."""
    return quote(os.fsencode(name))


def _size(page: Path) -> str:
    return f"{page.stat().st_size / 1e6:.1f}&nbsp;MB"


def _cells(summary: Summary) -> list[str]:
    def mean(name: str, form: str = ".3f") -> str:
        value, infinite = summary.means.get(name), summary.num_infinite.get(name, 0)
        bound = "≥ " if name in summary.lower_bounds and value is not None else ""
        text = "" if value is None else f"{bound}{value:{form}}"
        more = f"<small>{infinite:,} infinite</small>" if infinite else ""
        return text + more or "–"

    right = f"{summary.num_right} of {summary.num_graded}" if summary.num_graded else "–"
    return [
        *(f"{n:,}" for n in (summary.num_prompts, summary.num_responses, summary.num_tokens)),
        f"{summary.num_truncated / max(summary.num_responses, 1):.0%}",
        *(
            right,
            mean("gate", ".1%") if summary.has_gate else "no gate",
            mean("reverse_kl"),
            mean("forward_kl"),
        ),
        *(mean("teacher_entropy"), mean("student_entropy")),
    ]
