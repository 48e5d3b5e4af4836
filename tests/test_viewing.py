"""Recordings as pages and as lines: what they hold, how large they are, what they refuse."""

import base64
import builtins
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest

from megatron_eopd import view
from megatron_eopd.errors import ConfigError
from megatron_eopd.tokens.file import evaluation_file, read_tokens, training_file, write_tokens
from megatron_eopd.tokens.record import TOP, Piece
from megatron_eopd.viewing import page as pages
from megatron_eopd.viewing.beside import beside
from megatron_eopd.viewing.columns import FARTHEST, encode
from megatron_eopd.viewing.index import summary_of
from megatron_eopd.viewing.page import Side, page_html
from megatron_eopd.viewing.recordings import recordings_of
from megatron_eopd.viewing.terminal import Choice, text_form, top_fives, wants_colour
from megatron_eopd.viewing.visible import Reader, plain
from tests.token_records import (
    big_record,
    hostile_record,
    make_record,
    with_infinite_values,
    written_by_hand,
)

STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""What no terminal may get: controls but the end of a line, marks of direction."""


def sides_of(record) -> list[Side]:
    return [Side("run", record.about, len(record.responses))]


def data_of(html: str) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'data-bytes="\d+">(.*?)</script>', html, re.DOTALL)[1])


def decode(column: dict) -> np.ndarray:
    """As data.js does: code 0 is unknown, odd codes from 0 on, even ones below; what is told in
    steps of less than 1 is infinite at the farthest."""
    plane_bytes = np.frombuffer(zlib.decompress(base64.b64decode(column["data"])), np.uint8)
    planes = plane_bytes.reshape(column["planes"], -1).astype(np.float64)
    codes = sum(plane * 256.0**n for n, plane in enumerate(planes))
    steps = np.where(codes % 2 == 1, (codes - 1) / 2, -codes / 2)
    is_infinite = (np.abs(steps) >= FARTHEST) & (column["step"] != 1)
    values = np.where(is_infinite, np.copysign(np.inf, steps), steps * column["step"])
    return np.where(codes == 0, np.nan, values)


@pytest.fixture
def run(tmp_path) -> Path:
    """Of two iterations and one evaluation."""
    run_dir = tmp_path / "mine"
    for iteration in (20, 120):
        write_tokens(training_file(run_dir, iteration), make_record(iteration=iteration))
    graded = make_record(kind="evaluation", iteration=120, task="countdown")
    verdicts = ("right", "wrong", "no answer", "right")
    both = zip(graded.responses, verdicts, strict=True)
    graded = replace(graded, responses=tuple(r._replace(verdict=v) for r, v in both))
    write_tokens(evaluation_file(run_dir / "evaluations/000120", "countdown"), graded)
    return run_dir


def test_a_page_holds_what_was_recorded():
    """Every value within 1e-4, ids and ranks to the bit, unknown ones as such."""
    record = make_record(((300, 200), (150, 250)), vocabulary=5000)
    record.signals["engine_mismatch"][::7] = np.nan
    record.top_student_logprobs_GK[::5] = np.nan
    columns = data_of(page_html(record, sides_of(record)))["columns"]
    for name, values_T in record.signals.items():
        np.testing.assert_allclose(decode(columns[name]), values_T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        decode(columns["engine_mismatch"]), record.signals["engine_mismatch"], rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(decode(columns["ids"]), record.ids_T)
    np.testing.assert_array_equal(decode(columns["student_rank"]), record.student_rank_T)
    np.testing.assert_array_equal(decode(columns["teacher_rank"]), record.teacher_rank_T)
    np.testing.assert_array_equal(decode(columns["top_rows"]).cumsum(), record.top_rows_G)
    ids_KG = decode(columns["top_ids"]).reshape(2 * TOP, -1)
    np.testing.assert_array_equal(np.nan_to_num(ids_KG, nan=-1), record.top_ids_GK.T)
    for name in ("top_student_logprobs", "top_teacher_logprobs"):
        logprobs_KG = decode(columns[name]).reshape(2 * TOP, -1)
        expected_KG = getattr(record, f"{name}_GK").T
        np.testing.assert_allclose(logprobs_KG, expected_KG, rtol=0, atol=1e-4)


def test_a_page_holds_the_bytes_of_every_token():
    record = hostile_record()
    columns = data_of(page_html(record, sides_of(record)))["columns"]
    names = ("ids", "lengths", "special", "bytes")
    ids, lengths, special, content = (decode(columns[f"piece_{n}"]).astype(int) for n in names)
    ends = lengths.cumsum()
    for i, end, length, is_special in zip(ids, ends, lengths, special, strict=True):
        found = Piece(bytes(content[end - length : end].tolist()), bool(is_special))
        assert found == record.pieces[i]
    assert len(ids) == len(record.pieces)


@pytest.mark.parametrize("step", [1.0, 1e-4])
def test_codes_of_columns_go_and_come_back(step):
    values = np.array([0, 1, -1, 127, 128, -128, 32768, 99999, np.nan, -1e5])
    np.testing.assert_allclose(decode(encode(values, step)), values, atol=step / 2, rtol=0)
    far = decode(encode(np.array([-np.inf, np.inf, -1e30]), step))
    assert far.tolist() == ([-np.inf, np.inf, -np.inf] if step < 1 else [-(2**30), 2**30, -(2**30)])
    assert len(decode(encode(np.array([]), step))) == 0


def test_a_page_of_a_real_run_is_small():
    """An eighth of 128 responses of 4,096 tokens takes less than an eighth of 25 MB."""
    record = big_record(responses=16)
    assert 0.29 < np.mean(record.signals["gate"]) < 0.33
    assert len(page_html(record, sides_of(record))) < 25e6 / 8


def test_a_page_keeps_the_alternatives_of_the_highest_entropies():
    record = make_record(((300,),), top_tokens="all")
    data = data_of(page_html(record, sides_of(record), most=40))
    kept = decode(data["columns"]["top_rows"]).cumsum().astype(int)
    highest = np.argsort(-record.signals["teacher_entropy"], kind="stable")[:40]
    assert data["alternatives_kept"] == 40 and data["summary"]["num_alternatives"] == 300
    assert kept.tolist() == sorted(highest.tolist())


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)


def test_no_text_of_a_model_becomes_a_part_of_the_page():
    """The tags of a hostile recording's page are those of a harmless one, and only the page's own
    script has the digest that is allowed."""
    harmless, hostile = make_record(((9,),)), hostile_record()
    found = []
    for record in (harmless, hostile):
        html = page_html(record, [Side("</title><script>x", record.about, 1)])
        parser = Tags()
        parser.feed(html)
        found.append(parser.tags)
        scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
        assert len(scripts) == 1
        digest = base64.b64encode(sha256(scripts[0].encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in html
    assert found[0] == found[1]
    assert data_of(html)["prompts"][0]["text"] == hostile.prompts[0].text


def test_the_page_asks_for_nothing_from_elsewhere():
    text = "".join((pages.HERE / name).read_text() for name in (*pages.SCRIPTS, "page.css"))
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|innerHTML|XMLHttpRequest", text)


def test_a_run_gets_a_page_of_every_recording_and_an_index(run, capsys):
    assert view.main([str(run)]) == 0
    names = {"000020.html", "000120.html", "evaluation-000120-countdown.html", "index.html"}
    assert {path.name for path in (run / "view").iterdir()} == names
    index = (run / "view/index.html").read_text()
    assert all(f'href="{name}"' in index for name in names - {"index.html"})
    assert "2 of 4" in index
    mean = make_record().signals["forward_kl"].mean(dtype=np.float64)
    assert index.count(f"<td>{mean:.3f}</td>") == 3
    assert "000120.html" in capsys.readouterr().out


def links_in(page: Path) -> dict[str, str]:
    return data_of(page.read_text())["links"]


def test_pages_lead_to_each_other(run, tmp_path):
    """To the index, and to the neighbours of the same kind that there are, as they stand beside the
    same run."""
    view.main([str(run)])
    output, index = run / "view", {"all recordings": "index.html"}
    assert links_in(output / "000020.html") == index | {"next →": "000120.html"}
    assert links_in(output / "000120.html") == index | {"← previous": "000020.html"}
    assert links_in(output / "evaluation-000120-countdown.html") == index
    write_tokens(training_file(run, 140), make_record(iteration=140))
    view.main([str(run)])
    assert links_in(output / "000140.html") == index | {"← previous": "000120.html"}
    for iteration in (20, 120):
        write_tokens(training_file(tmp_path / "other", iteration), make_record(iteration=iteration))
    view.main([str(run), "--compare", str(tmp_path / "other")])
    assert links_in(output / "000120-with-other.html") == index | {
        "← previous": "000020-with-other.html"
    }


def test_a_summary_of_an_earlier_version_is_read(run):
    view.main([str(run)])
    page = run / "view/000020.html"
    text = page.read_text()
    older = text.replace(", &quot;has_gate&quot;: true", "")
    assert older != text
    page.write_text(older)
    assert summary_of(page).has_gate


def test_without_a_run_the_run_alone_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        view.main([])
    assert capsys.readouterr().err.endswith("the following arguments are required: RUN\n")


def test_pages_that_are_newer_than_their_recording_stay(run, capsys):
    view.main([str(run)])
    old = run / "view/000020.html"
    os.utime(old, (1, 1))
    write_tokens(training_file(run, 140), make_record(iteration=140))
    untouched = (run / "view/000120.html").stat().st_mtime_ns
    capsys.readouterr()
    assert view.main([str(run)]) == 0
    told = capsys.readouterr().out
    assert "000140.html" in told and "000020.html" in told and "000120.html" not in told
    assert (run / "view/000120.html").stat().st_mtime_ns == untouched
    assert summary_of(old).iteration == 20


def rows_of_index(output: Path) -> list[str]:
    """Of recordings, without the headings."""
    rows = re.findall("<tr>(.*?)</tr>", (output / "index.html").read_text())
    return [row for row in rows if "<td>" in row]


def test_the_index_lists_what_has_no_page_but_beside_another_run(run, tmp_path):
    """With the figures of the run's own responses, whatever the other one's are."""
    other = make_record(((40, 40, 40), (50, 50)), iteration=20, seed=3)
    write_tokens(training_file(tmp_path / "other", 20), other)
    assert view.main([str(run), "--iteration", "20", "--compare", str(tmp_path / "other")]) == 0
    (row,) = rows_of_index(run / "view")
    assert 'href="000020-with-other.html">beside other<' in row and "iteration 20" in row
    own = make_record(iteration=20)
    assert f"<td>{len(own.responses)}</td><td>{len(own.ids_T)}</td>" in row
    assert f"<td>{own.signals['forward_kl'].mean(dtype=np.float64):.3f}</td>" in row
    view.main([str(run)])
    assert len(rows_of_index(run / "view")) == 3


def test_the_index_tells_tasks_apart_of_which_one_begins_as_the_other(run):
    write_tokens(
        evaluation_file(run / "evaluations/000120", "countdown-with-care"),
        make_record(kind="evaluation", iteration=120, task="countdown-with-care"),
    )
    view.main([str(run), "--evaluation", "120"])
    rows = rows_of_index(run / "view")
    assert len(rows) == 2 and sum("countdown-with-care.html" in row for row in rows) == 1


def test_runs_of_one_name_get_pages_of_their_own(run, tmp_path):
    """Named by the folders that they are in, in their pages too; the names stay when all move."""
    for moved in ("here", "there"):
        home = tmp_path / moved
        for n, folder in enumerate(("a", "b", "deep/b")):
            path = training_file(home / folder / "mine", 20)
            write_tokens(path, make_record(iteration=20, seed=n))
        for folder in ("b", "deep/b"):
            command = ["--iteration", "20", "--compare", str(home / folder / "mine")]
            assert view.main([str(home / "a/mine"), *command]) == 0
    here, there = (
        {
            path.name: path.read_text()
            for path in (tmp_path / moved / "a/mine/view").glob("*-*.html")
        }
        for moved in ("here", "there")
    )
    assert len(here) == 2 and here.keys() == there.keys()
    assert all(re.fullmatch(r"000020-with-b-mine-[0-9a-f]{8}\.html", name) for name in here)
    assert all("<title>20 · a/mine and b/mine</title>" in text for text in here.values())


def test_another_colour_is_taken_by_pages_that_there_are(run):
    view.main([str(run)])
    assert view.main([str(run), "--signal", "forward_kl"]) == 0
    for name in ("000020", "000120", "evaluation-000120-countdown"):
        assert data_of((run / f"view/{name}.html").read_text())["signal"] == "forward_kl"


def test_one_recording_and_another_place(run, tmp_path):
    assert view.main([str(run), "--evaluation", "120", "--output", str(tmp_path / "out")]) == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"evaluation-000120-countdown.html", "index.html"}


def damage(run: Path) -> None:
    whole = training_file(run, 120).read_bytes()
    training_file(run, 120).write_bytes(whole[: len(whole) // 2])


def age(run: Path) -> None:
    path = training_file(run, 120)
    with np.load(path) as file:
        columns = {name: file[name] for name in file.files}
    texts = json.loads(columns["about"].tobytes()) | {"format": 99}
    columns["about"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    np.savez(path, **columns)


def put_array(run: Path) -> None:
    path = training_file(run, 120)
    np.save(path.with_suffix(".npy"), np.arange(3))
    path.with_suffix(".npy").rename(path)


def rewrite(run: Path, **changed: np.ndarray) -> None:
    path = training_file(run, 120)
    with np.load(path) as file:
        columns = {name: file[name] for name in file.files}
    np.savez(path, **columns | changed)


def lose_piece(run: Path) -> None:
    rewrite(run, ids=np.full(51, 77_777, np.int32))


def shorten(run: Path) -> None:
    rewrite(run, ids=np.full(50, 1, np.int32))


def put_folder(run: Path) -> None:
    training_file(run, 120).unlink()
    training_file(run, 120).mkdir()


def forget(run: Path) -> None:
    (run / "config.json").write_text("{}")
    for recording in recordings_of(run):
        recording.path.unlink()


def lose_config(run: Path) -> None:
    forget(run)
    (run / "config.json").unlink()


@pytest.mark.parametrize(
    ("arguments", "prepare", "told"),
    [
        (["--iteration", "7"], None, r"training 20, 120; evaluations 120.*record_tokens_interval"),
        (["--evaluation", "20"], None, r"training 20, 120; evaluations 120"),
        (["--iteration", "120"], damage, r"000120\.npz: no whole recording"),
        (["--iteration", "120"], put_array, r"000120\.npz: no whole recording.*a single array"),
        (["--iteration", "120"], lose_piece, r"000120\.npz: damaged"),
        (["--iteration", "120"], shorten, r"000120\.npz: damaged"),
        (["--iteration", "120"], put_folder, r"000120\.npz: cannot be read \(Is a directory\)"),
        (["--output", "{run}/tokens/000120.npz"], None, r"000120\.npz: cannot be written"),
        (["--output", "{run}/tokens/000120.npz/x"], None, r"/x: cannot be written.*--output"),
        (["--output", "{run}/" + "x" * 300], None, r"x: cannot be written \(File name too long"),
        (["--iteration", "120"], age, r"format 99, and this version reads"),
        ([], forget, r"no tokens were recorded\. .*logging\.record_tokens_interval"),
        (["--text"], forget, r"no tokens were recorded"),
        ([], lose_config, r"mine: has neither config\.json nor .* so it is no run's"),
        (["--iteration", "20"], lose_config, r"no run's\. Name the run_dir"),
        (["--text", "--compare", "x"], None, r"--text shows one run"),
        (["--compare", "nowhere"], None, r"nowhere: no such directory"),
        (["--compare", "{run}@20"], None, r"--iteration or --evaluation"),
        (["--compare", "{run}"], None, r"the same recordings .* \S+mine@N beside --iteration"),
        (["--iteration", "20", "--compare", "{run}"], None, r"the same recordings"),
        (["--evaluation", "120", "--compare", "{run}/../mine@120"], None, r"the same recordings"),
        (["--iteration", "20", "--compare", "{run}@33"], None, r"training 33.*training 20, 120"),
    ],
)
def test_what_cannot_be_shown_is_said(run, arguments, prepare, told, capsys):
    """With status 1, one message, and no traceback."""
    if prepare is not None:
        prepare(run)
    assert view.main([str(run), *(each.format(run=run) for each in arguments)]) == 1
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize("spoil", [damage, put_array, lose_piece, put_folder])
def test_what_is_whole_is_shown_beside_what_is_damaged(run, spoil, capsys):
    spoil(run)
    assert view.main([str(run)]) == 1
    assert (run / "view/000020.html").is_file() and not (run / "view/000120.html").exists()
    assert len(rows_of_index(run / "view")) == 2
    assert "000120.npz" in capsys.readouterr().err


def test_the_text_form_of_other_tasks_is_shown_beside_what_is_damaged(run, capsys):
    evaluation_file(run / "evaluations/000120", "aime").write_bytes(b"PK")
    assert view.main([str(run), "--evaluation", "120", "--text"]) == 1
    told = capsys.readouterr()
    assert "aime.tokens.npz" in told.err and "evaluation 120, countdown" in told.out


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_the_disk_says_is_no_damage_of_a_recording(run, monkeypatch, capsys, code):
    """Nobody is told to remove a file that may be whole."""

    def refuse(path, *args, **kwargs):
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        for owner, name in ((io, "open"), (builtins, "open")):
            patch.setattr(owner, name, refuse)
        status = view.main([str(run), "--iteration", "120", "--text"])
    told = capsys.readouterr().err
    assert status == 1 and f"000120.npz: cannot be read ({os.strerror(code)})" in told
    assert "emove" not in told


def test_a_folder_that_may_not_be_read_is_not_an_empty_one(run, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for name in ("scandir", "listdir"):  # of glob and of iterdir
        monkeypatch.setattr(os, name, refuse)
    assert view.main([str(run)]) == 1
    assert "tokens: cannot be read (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("method", ["mkdir", "write_text", "replace"])
def test_a_folder_that_may_not_be_written_is_said(run, monkeypatch, capsys, method, code):
    def refuse(path, *args, **kwargs):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, method, refuse)
    assert view.main([str(run)]) == 1
    told = capsys.readouterr().err
    assert re.search(rf"view.*: cannot be written \({os.strerror(code)}\)\. .*--output", told)
    assert not list(run.rglob("*.unfinished"))


def test_a_folder_whose_name_is_no_text_is_shown(run, tmp_path):
    """In a process of its own, with a terminal's strict encoding."""
    odd = tmp_path / os.fsdecode(b"m\xffine")
    shutil.copytree(run, odd)
    command = [sys.executable, "-m", "megatron_eopd.view", os.fsencode(odd)]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    for more in ([], ["--evaluation", "120", "--compare", os.fsencode(run)], ["--text"]):
        done = subprocess.run([*command, *more], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr.decode()
    assert "<title>20 · m?ine</title>" in (odd / "view/000020.html").read_text()
    beside_odd = ["--iteration", "20", "--compare", os.fsencode(odd)]
    command = [sys.executable, "-m", "megatron_eopd.view", str(run), *beside_odd]
    assert subprocess.run(command, capture_output=True, env=environment).returncode == 0
    (row,) = rows_of_index(run / "view")
    linked = os.fsencode(run / "view") + b"/" + unquote_to_bytes(re.search('href="(.*?)"', row)[1])
    assert os.path.isfile(linked)


def test_a_file_that_is_being_written_is_no_recording(run):
    training_file(run, 140).with_suffix(".unfinished").write_bytes(b"PK")
    assert [each.name for each in recordings_of(run)] == [
        *("000020", "000120", "evaluation-000120-countdown")
    ]


def test_two_runs_beside_each_other():
    """B's responses to shared prompts follow A's, each with its own tokens and alternatives."""
    a, b = make_record(seed=1), make_record(((8,), (7, 6), (5,)), seed=2)
    # Of b's prompts the last is unknown to a, and the first two are in the other order.
    prompts = (a.prompts[1], a.prompts[0], b.prompts[2]._replace(ids=(9, 9)))
    b = replace(b, prompts=prompts)
    both = beside(a, b)
    assert [(r.prompt, r.length) for r in both.responses[4:]] == [(1, 8), (0, 7), (0, 6)]
    count, shared = len(a.ids_T), 8 + 7 + 6
    np.testing.assert_array_equal(both.ids_T, [*a.ids_T, *b.ids_T[:shared]])
    for name, values_T in both.signals.items():
        np.testing.assert_array_equal(values_T[count:], b.signals[name][:shared])
    own_G = both.top_rows_G >= count
    theirs_G = b.top_rows_G < shared
    assert theirs_G.any() and not theirs_G.all()
    np.testing.assert_array_equal(both.top_rows_G[own_G] - count, b.top_rows_G[theirs_G])
    np.testing.assert_array_equal(both.top_ids_GK[own_G], b.top_ids_GK[theirs_G])


def test_runs_without_a_common_prompt_are_not_compared(run, tmp_path, capsys):
    other = make_record()
    prompts = tuple(prompt._replace(ids=(3,)) for prompt in other.prompts)
    write_tokens(training_file(tmp_path / "other", 120), replace(other, prompts=prompts))
    command = [str(run), "--iteration", "120", "--compare", str(tmp_path / "other")]
    assert view.main(command) == 1
    assert "share no prompt, of 2 and 2" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="different tasks, countdown and training"):
        beside(make_record(task="countdown"), other)


def test_a_comparison_of_whole_runs_takes_what_both_have(run, tmp_path):
    write_tokens(training_file(tmp_path / "other", 20), make_record(iteration=20, seed=3))
    assert view.main([str(run), "--compare", str(tmp_path / "other")]) == 0
    assert {path.name for path in (run / "view").iterdir()} == {
        *("000020-with-other.html", "index.html")
    }
    assert view.main([str(run)]) == 0
    assert 'href="000020-with-other.html"' in (run / "view/index.html").read_text()


def lines_of(record, has_colour=False, limit=4, signal="teacher_entropy", width=400) -> str:
    return "\n".join(text_form(record, "run", Choice(signal, has_colour, limit, width)))


def worst_of(text: str, label: str) -> list[str]:
    """The lines below their heading."""
    return re.split(rf"the \d largest by {label}, of \d+ tokens\n", text)[1].splitlines()


def test_the_text_form_shows_gate_colours_and_alternatives():
    record = written_by_hand()
    text = lines_of(record)
    assert " the sum[ of] both⟨|im_end|⟩" in text
    assert "prompt 0 (answer 19)" in text and "5 tokens, gate 0.200" in text
    assert "[ ]: gate > 0; the largest by teacher entropy are listed below" in text
    worst = worst_of(text, "teacher entropy")
    assert worst[0].startswith("« so»  prompt 0, sample 1, token 3: teacher entropy 2.000")
    assert worst[1].split() == [
        "teacher's",
        "top",
        "5",
        "p",
        "q",
        "student's",
        "top",
        "5",
        "p",
        "q",
    ]
    assert worst[2].split() == ["«", "the»", "0.400", "0.100", "«", "12»", "0.001", "0.500"]
    assert worst[6].split() == ["«", "is»", "0.050", "0.040", "«", "is»", "0.050", "0.040"]
    coloured = lines_of(record, has_colour=True)
    assert "\x1b[4;48;5;" in coloured and "[ of]" not in coloured
    assert "underlined: gate > 0" in coloured and "[ ]" not in coloured
    assert "1 more responses" in lines_of(record, limit=1)


def test_the_text_form_is_as_wide_as_the_terminal():
    """Nothing of a token is lost where lines end, wide characters count as two columns, and the
    columns of likely tokens stand below each other."""
    record = make_record(((60, 5),))
    record.pieces[record.ids_T[3]] = Piece(" 你好 é".encode(), False)
    record.top_teacher_logprobs_GK[:, 1] = np.log(1e-5)
    text = lines_of(record, width=80)
    widths = [wcswidth(line) for line in text.splitlines()]
    assert 70 < max(widths) <= 80 and max(map(len, lines_of(record).splitlines())) > 100
    narrow, wide = (
        re.search(r"─ sample 0(.*)\n\n─ sample 1", each, re.DOTALL)[1]
        for each in (text, lines_of(record))
    )
    assert narrow.count("\n") > wide.count("\n")
    assert re.sub(r"\s", "", narrow) == re.sub(r"\s", "", wide)
    table = [line for line in text.splitlines() if line.startswith("    «")]
    assert any("< 0.001" in line for line in table)
    assert {wcswidth(line[: line.rindex("«")]) for line in table if line.count("«") == 2} == {40}


def wcswidth(line: str) -> int:
    return sum(2 if char in "你好" else 1 for char in line)


def test_an_objective_without_a_gate_has_none_to_tell_of(run):
    """A share of 0 or 1 that nothing has decided would read as a finding."""
    for gate in ("never", "always"):
        record = make_record(iteration=140, gate=gate)
        text = lines_of(record)
        assert "eopd, no gate, models/teacher" in text and "tokens, no gate, reverse KL" in text
        assert not re.search(r"gate \d|\[ \w|\[ \]|τ", text)
        assert "underlined" not in lines_of(record, has_colour=True)
        write_tokens(training_file(run, 140), record)
        view.main([str(run), "--iteration", "140"])
        (row,) = rows_of_index(run / "view")
        assert "<td>no gate</td>" in row


@pytest.mark.parametrize(
    ("is_terminal", "environment", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "1", "TERM": "dumb"}, True),
        (True, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_and_for_who_asks(
    monkeypatch, is_terminal, environment, expected
):
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    assert wants_colour(stream) == expected


def test_rounding_of_the_engine_has_no_strong_colour():
    record = make_record()
    record.signals["engine_mismatch"] = np.linspace(-4e-6, 4e-6, 51, dtype=np.float32)
    legend = lines_of(record, has_colour=True, signal="engine_mismatch").splitlines()[4]
    assert re.sub(r"\x1b\[[\d;]*m| +", " ", legend).startswith("engine mismatch: -0.001")


def test_the_students_five_come_from_both_lists():
    record = written_by_hand()
    of_teacher, of_student = top_fives(record, 0)
    assert of_teacher == [0, 1, 2, 3, 4] and of_student == [TOP, 1, 0, 2, 4]


def test_the_terminal_gets_no_control_character_of_a_model():
    record = hostile_record()
    assert not STEERING.search(lines_of(record))
    coloured = lines_of(record, has_colour=True)
    assert not STEERING.search(re.sub(r"\x1b\[[\d;]*m", "", coloured))
    # Nor anything that is like our own colours, but was the model's.
    assert "␛[31mred␛[0m" in coloured


@pytest.mark.parametrize(("signal", "unknown"), [("engine_mismatch", True), ("gate", False)])
def test_the_text_form_takes_every_signal(signal, unknown):
    record = make_record()
    if unknown:
        record.signals[signal][:] = np.nan
    assert "sample 0" in lines_of(record, has_colour=True, signal=signal)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("signal", pages.COLOURS)
def test_the_text_form_takes_values_that_are_not_finite(signal, value):
    """Few of them, and nothing else."""
    for places in (slice(3, 5), slice(None)):
        record = make_record()
        record.signals[signal][places] = value
        coloured = lines_of(record, has_colour=True, signal=signal)
        assert "nan" not in re.sub(r"\x1b\[[\d;]*m", "", coloured) and "inf " not in coloured


def test_infinite_values_are_told_beside_the_others():
    """As such at their token, and in means as a count, so that these still tell of the others."""
    record = with_infinite_values()
    text = lines_of(record, signal="reverse_kl")
    finite = record.signals["reverse_kl"][[0, 1, 2, 3, 4, 7, 8]].mean(dtype=np.float64)
    assert f"reverse KL {finite:.3f} (1 infinite)" in text.splitlines()[3]
    worst = worst_of(text, "reverse KL")
    assert worst[0].startswith("« the»  prompt 0, sample 1, token 0:")
    assert "reverse KL ∞, forward KL 3.500" in worst[0]
    record.signals["reverse_kl"][:] = np.inf
    assert "reverse KL none finite (9 infinite)" in lines_of(record)


def test_the_index_counts_infinite_values(run):
    record = replace(with_infinite_values(), about=make_record(iteration=140).about)
    write_tokens(training_file(run, 140), record)
    view.main([str(run), "--iteration", "140"])
    (row,) = rows_of_index(run / "view")
    finite = record.signals["reverse_kl"][[0, 1, 2, 3, 4, 7, 8]].mean(dtype=np.float64)
    assert f"<td>{finite:.3f}<small>1 infinite</small></td>" in row


def test_divergences_from_a_teachers_top_k_are_told_as_bounds(run):
    """Of k + 1 parts; entropies are exact."""
    record = make_record(iteration=140, payload="topk")
    text = lines_of(record, has_colour=True, signal="forward_kl")
    assert re.search("^forward KL, at least: ", text, re.MULTILINE)
    bounds, others = "(reverse KL|forward KL)", "(teacher entropy|gate|student entropy)"
    assert len(re.findall(rf"{bounds} at least \d", text)) == 2 * (1 + 4 + 5)
    assert not re.search(rf"{bounds} \d|{others} at least", text)
    assert "at least" not in lines_of(make_record(), has_colour=True)
    write_tokens(training_file(run, 140), record)
    view.main([str(run), "--iteration", "140"])
    (row,) = rows_of_index(run / "view")
    for name, bound in (("reverse_kl", "≥ "), ("forward_kl", "≥ "), ("teacher_entropy", "")):
        assert f"<td>{bound}{record.signals[name].mean(dtype=np.float64):.3f}</td>" in row


def test_the_command_writes_without_colours_into_a_pipe(run):
    command = [sys.executable, "-m", "megatron_eopd.view", str(run), "--text", "--limit", "1"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith("mine, training 120") and "\x1b" not in told


def test_viewing_needs_no_torch(run):
    code = f"import sys; from megatron_eopd.view import main; main([{str(run)!r}])"
    check = code + "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("contents", "shown"),
    [
        ([b"\xe4\xbd", b"\xa0!"], ["⟨E4 BD⟩", "你!"]),
        ([b"a\xf0", b"\x9f\x98", b"\x80"], ["a⟨F0⟩", "⟨9F 98⟩", "😀"]),
        ([b"\xe4\xbd", b"x"], ["⟨E4 BD⟩", "x"]),
        ([b"\xe4\xbd\xe4\xbd\xa0"], ["⟨E4 BD⟩你"]),
        ([b"\xff\xfea\x80"], ["⟨FF FE⟩a⟨80⟩"]),
        ([b"\xed\xa0\x80", b"\xc0\xaf"], ["⟨ED A0 80⟩", "⟨C0 AF⟩"]),
        ([b"\xf4\x90\x80\x80"], ["⟨F4 90 80 80⟩"]),
        (["\u202ea\u200b\u00a0\ufeff".encode()], ["[U+202E]a[U+200B][U+00A0][U+FEFF]"]),
        ([b"\x00\x1b\x7f\t\n"], ["␀␛␡⇥↵"]),
        (["\ue000\u3164\U000e0041".encode()], ["[U+E000][U+3164][U+E0041]"]),
    ],
)  # fmt: skip
def test_every_byte_of_a_token_is_seen(contents, shown):
    """Characters at the token that completes them, other bytes as hexadecimal numbers."""
    reader = Reader()
    parts = [reader.read(Piece(content, False)) for content in contents]
    assert ["".join(part.text for part in own) for own in parts] == shown


def test_special_tokens_are_marked_and_end_a_character():
    reader = Reader()
    assert reader.read(Piece(b"\xe4\xbd", False))[0].kind == "hex"
    (special,) = reader.read(Piece(b"<|im_end|>", True))
    assert special == ("special", "⟨|im_end|⟩")
    assert reader.read(Piece(b"\xa0", False))[0].text == "⟨A0⟩"
    assert plain("a\x1bb") == "a␛b"


def test_the_reader_shows_valid_text_as_it_is():
    """However it is cut into tokens."""
    text, draw = "Grüße, 你好 😀 ñ שלום", np.random.default_rng(0)
    content = text.encode()
    for _ in range(20):
        cuts = sorted(draw.choice(range(1, len(content)), 5, replace=False).tolist())
        reader, seen = Reader(), ""
        for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
            parts = reader.read(Piece(content[begin:end], False))
            seen += "".join(part.text for part in parts if part.kind == "text")
        assert seen == text


def test_the_text_form_has_what_the_teacher_reads_instead():
    record = make_record()
    shown = record.prompts[0]._replace(read_by_teacher="the sum\x1b[2J is\n19")
    text = lines_of(replace(record, prompts=(shown, *record.prompts[1:])))
    assert text.count("what the teacher reads in its place") == 1
    assert "\x1b[2J" not in text and "\n19\n" in text


def test_a_recording_of_the_format_before_is_read(tmp_path):
    """It does not say what a teacher reads."""
    path, record = tmp_path / "000001.npz", make_record()
    write_tokens(path, record)
    columns = dict(np.load(path))
    texts = json.loads(columns["about"].tobytes()) | {"format": 1}
    for prompt in texts["prompts"]:
        del prompt["read_by_teacher"]
    columns["about"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    np.savez(path, **columns)
    assert read_tokens(path).prompts == record.prompts
