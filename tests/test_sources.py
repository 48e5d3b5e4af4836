"""Files of rows: every form gives the same rows, and what is wrong with one is said by name."""

import bz2
import gzip
import json
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tqdm import tqdm

from megatron_eopd.data import sources
from megatron_eopd.data.sources import RowFile, with_progress
from megatron_eopd.errors import ConfigError

ROWS = [
    {"prompt": "1\u2028 2", "answer": None, "more": [{"role": "user", "content": "é"}]},
    {"prompt": "3]", "answer": "x", "more": []},
    {"prompt": "", "answer": "[", "more": [{"role": "a", "content": "\n"}]},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=2).encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def parquet(rows: list) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


FORMS = {
    "lines": LINES,
    "blank lines": b"\n \n" + LINES.replace(b"\n", b"\r\n\r\n"),
    "no last line feed": LINES.rstrip(),
    "lines with a byte order mark": b"\xef\xbb\xbf" + LINES,
    "array": ARRAY,
    "array on one line": json.dumps(ROWS).encode(),
    "array with a byte order mark": b"\xef\xbb\xbf \n" + ARRAY,
    "parquet": parquet(ROWS),
    "gzip": gzip.compress(LINES),
    "gzip in two parts": gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
    "array in gzip": gzip.compress(ARRAY),
    "zstd": zstd(LINES),
    "array in zstd": zstd(ARRAY),
    "bz2": bz2.compress(LINES),
}


@pytest.fixture
def file(tmp_path):
    """Writes a file, under a name that says nothing of its form."""

    def write(content: bytes) -> Path:
        (tmp_path / "rows.jsonl").write_bytes(content)
        return tmp_path / "rows.jsonl"

    return write


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(file, form):
    """By what the file holds: the name is the same for all. It can be read again."""
    rows = RowFile(file(FORMS[form]))
    assert [row for _, row in rows] == [row for _, row in rows] == ROWS
    assert rows.done == rows.size == len(FORMS[form])


def test_rows_say_where_they_stand(file):
    for content, places in (
        (LINES.replace(b"\n", b"\n\n"), ["line 1", "line 3", "line 5"]),
        (ARRAY, ["row 1", "row 2", "row 3"]),
        (parquet(ROWS), ["row 1", "row 2", "row 3"]),
    ):
        path = file(content)
        assert [where for where, _ in RowFile(path)] == [f"{path} {place}" for place in places]


def test_no_rows(file):
    for content in (b"", b"\n \n", b"[]", b" [ ]\n", gzip.compress(b""), parquet(ROWS)[:0]):
        assert list(RowFile(file(content))) == []


UNREADABLE = {
    "gzip cut": (gzip.compress(LINES)[:-12], "cannot be read.*cut short"),
    "gzip damaged": (gzip.compress(LINES)[:30] + b"x" * 30, "cannot be read"),
    "zstd cut": (zstd(LINES)[:-5], "cannot be read.*cut short"),
    "parquet cut": (parquet(ROWS)[:-100], "cannot be read.*cut short"),
    "parquet damaged": (b"PAR1 and no more", "cannot be read"),
    "parquet in gzip": (gzip.compress(parquet(ROWS)), "parquet inside another compression"),
    "UTF-16": (LINES.decode().encode("utf-16"), "UTF-16.*iconv"),
    "UTF-16 without mark": (LINES.decode().encode("utf-16-le"), "neither JSON"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
    "Arrow": (b"ARROW1\0\0", "Arrow file. Write it as parquet"),
    "Arrow stream": (b"\xff\xff\xff\xff\x10", "Arrow stream.*tools/prepare_data"),
    "zip": (b"PK\x03\x04xx", "zip archive"),
    "binary": (b"\x00\x01\x02", "neither JSON.*nor parquet"),
    "CSV": (b"prompt,answer\n1,2\n", "neither JSON.*begins with b'prompt,answer"),
    "web page": (b"<!DOCTYPE html>", "neither JSON"),
    "latin 1": (LINES + '{"prompt": "é"}'.encode("latin1"), "line 4: not valid UTF-8.*iconv"),
    "latin 1 in an array": ('[\n{"prompt": "é"}]'.encode("latin1"), "not valid UTF-8 1 line"),
    "binary line": (LINES + b"\x00\x01", "line 4: not valid JSON"),
    "cut line": (LINES + b'{"prompt": "a', r"line 4: not valid JSON.*cut short"),
    "object over lines": (b'{\n  "data": []\n}', "line 1: not valid JSON.*over several lines"),
    "no object": (LINES + b'["a"]', r'line 4: expected a JSON object, got \["a"\]'),
    "twice": (LINES + b'{"prompt": "a", "prompt": "b"}', "line 4: .*key 'prompt' stands twice"),
    "digits": (LINES + b'{"prompt": ' + b"1" * 5000 + b"}", "line 4: not valid JSON"),
    "deep": (LINES + b'{"prompt": ' + b"[" * 10**5, "line 4: not valid JSON"),
    "array of text": (b'["a", "b"]', 'row 1: expected a JSON object, got "a"'),
    "array cut": (ARRAY[:-10], "row 3: not valid JSON.*cut short"),
    "array without end": (ARRAY.rstrip()[:-1], "row 3: behind it comes neither .* but the end"),
    "array without comma": (b'[{"a": 1} {"a": 2}]', r"row 1: behind it .* but '\{\"a\": 2\}\]'"),
    "arrays a line": (b'[{"a": 1}]\n[{"a": 1}]', "behind the array that it begins with"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_told_with_its_place(file, case):
    content, problem = UNREADABLE[case]
    path = file(content)
    with pytest.raises(ConfigError, match=rf"(?s)^{path}.*{problem}") as error:
        list(RowFile(path))
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="absent: no such file"):
        RowFile(tmp_path / "absent")
    (tmp_path / "b.parquet").touch()
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(
        ConfigError, match=r"a directory. Name one of its files: a.jsonl, b.parquet"
    ):
        RowFile(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.jsonl", "w") as archive:
        archive.writestr("a", LINES)
    with pytest.raises(ConfigError, match=r"a zip archive. Unpack it"):
        list(RowFile(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_saved_data_set_is_told_what_to_do_with(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"save_to_disk wrote.*tools/prepare_data\.py"):
        RowFile(tmp_path)


@pytest.mark.parametrize(
    "content", [LINES * 400, b"[%b]" % b",".join(LINES.split(b"\n")[:-1] * 400)]
)
def test_progress_is_told_in_bytes(file, monkeypatch, content):
    """So that what is left can be told from the first rows on; one rank alone tells it."""
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": options["disable"] is True})
            bars.append(self)

    monkeypatch.setattr(sources, "tqdm", Bar)
    rows = RowFile(file(content))
    seen = [bars[0].n for _ in with_progress(rows, [rows])]
    assert len(seen) == 1200 and seen == sorted(seen)
    assert bars[0].total == len(content) and 0.99 < bars[0].n / len(content) <= 1
    assert 0.3 < seen[600] / len(content) < 0.7
    monkeypatch.setenv("RANK", "1")
    assert len(list(with_progress(rows, [rows]))) == 1200 and bars[1].disable
