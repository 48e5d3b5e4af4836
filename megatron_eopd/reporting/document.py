"""A report's text, once. In: sections of paragraphs, tables, pictures. Out: Markdown, and one HTML
page that holds its pictures.

Text is plain text: names of runs and tasks come from users, so each form escapes all of it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from megatron_eopd.reporting.run_records import printable


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Picture:
    name: str
    """Of its file, without .svg."""
    caption: str
    svg: str


Part = str | Table | Bullets | Code | Picture


@dataclass(frozen=True)
class Section:
    title: str
    """Empty for what stands below the report's own title."""
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Document:
    title: str
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> list[Picture]:
        parts = [part for section in self.sections for part in section.parts]
        return [part for part in parts if isinstance(part, Picture)]


# --- Markdown -----------------------------------------------------------------------------------


def to_markdown(document: Document, pictures: Path) -> str:
    """`pictures`: the folder of the .svg files, from where the text lies."""
    blocks = [f"# {_plain(document.title)}"]
    for section in document.sections:
        blocks += [f"## {_plain(section.title)}"] if section.title else []
        blocks += [_markdown(part, pictures) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def _markdown(part: Part, pictures: Path) -> str:
    match part:
        case Table():
            return table_markdown(part)
        case Bullets(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Code(text):
            return "\n".join(f"    {line}" for line in printable(text).splitlines())
        case Picture(name, caption):
            return f"![{_plain(name)}]({(pictures / name).as_posix()}.svg)\n\n{_plain(caption)}"
    return _plain(part)


def table_markdown(table: Table) -> str:
    rule = f"|{'---|' * len(table.header)}"
    lines = [f"| {' | '.join(map(_plain, row))} |" for row in (table.header, *table.rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


_SPECIAL = re.compile(r"[\\`*|]|\](?=[(\[:])|<(?=[A-Za-z/!?])")
"""Of Markdown, where it stands so that it means something."""


def _plain(text: str) -> str:
    """Markdown that shows the text; `pass^4` and `teacher_entropy` need no escape."""
    text = " ".join(printable(text).split())
    return _SPECIAL.sub(lambda found: "\\" + found[0], text.replace("&", "&amp;"))


# --- HTML ---------------------------------------------------------------------------------------


def to_html(document: Document) -> str:
    """Opens without a server or a network, and runs no script."""
    title = _html_text(document.title)
    body = [f"<h1>{title}</h1>", _contents(document)]
    for n, section in enumerate(document.sections):
        heading = f"<h2>{_html_text(section.title)}</h2>" if section.title else ""
        parts = "\n".join(map(_html, section.parts))
        body.append(f'<section id="s{n}">{heading}\n{parts}</section>')
    return _PAGE.format(title=title, style=_STYLE, body="\n".join(body))


def _contents(document: Document) -> str:
    links = [
        f'<a href="#s{n}">{_html_text(section.title)}</a>'
        for n, section in enumerate(document.sections)
        if section.title
    ]
    return f"<nav>{' · '.join(links)}</nav>"


def _html(part: Part) -> str:
    match part:
        case Table(header, rows):
            head = "".join(f"<th>{_html_text(cell)}</th>" for cell in header)
            return (
                f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{''.join(map(_html_row, rows))}</tbody></table></div>"
            )
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{_html_text(item)}</li>' for item in items)}</ul>"
        case Code(text):
            return f"<pre>{_html_text(text)}</pre>"
        case Picture(_, caption, svg):
            return (
                f'<figure role="img" aria-label="{_html_text(caption)}">{svg}'
                f"<figcaption>{_html_text(caption)}</figcaption></figure>"
            )
    return f"<p>{_html_text(part)}</p>"


def _html_row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{_html_text(cell)}</td>' for cell in cells)}</tr>"


def _html_text(text: str) -> str:
    return escape(printable(text))


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --line: #d8dce0; --soft: #5b6570; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem; background: #fff; color: #1c2128; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h1, h2, li, p { overflow-wrap: anywhere; }
nav, figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .18rem .9rem .18rem 0; border-bottom: 1px solid var(--line); }
td { max-width: 34rem; overflow-wrap: anywhere; }
figure { display: inline-block; max-width: 100%; margin: .8rem 0; vertical-align: top; }
figure svg { max-width: 100%; height: auto; } figcaption { contain: inline-size; }
pre { overflow-x: auto; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 4px; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a3f45; --soft: #a0a8b0; }
  body { background: #1a1a1a; color: #e4e6e8; } a { color: #8ab4f8; }
  figure svg { filter: invert(.9) hue-rotate(180deg); }
}
"""
