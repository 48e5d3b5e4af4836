"""The page in a real browser: what a person sees of a recording, by mouse and by keys."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_eopd import view
from megatron_eopd.tokens.file import evaluation_file, read_tokens, training_file, write_tokens
from megatron_eopd.tokens.record import SIGNALS, Piece
from megatron_eopd.viewing.beside import beside
from megatron_eopd.viewing.page import COLOURS, Side, page_html
from megatron_eopd.viewing.visible import Reader
from tests.token_records import (
    HOSTILE,
    big_record,
    hostile_record,
    make_record,
    with_infinite_values,
    written_by_hand,
)

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)}")
READY = "body[data-ready]"


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        # Root, as in containers, gets no sandbox.
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def show(browser, tmp_path) -> Iterator:
    """Open a recording's page; afterwards it has fetched nothing, run nothing, complained of
    nothing."""
    context = browser.new_context(viewport={"width": 1300, "height": 800})
    context.set_default_timeout(20_000)
    page = context.new_page()
    noticed: list[str] = []
    page.on("dialog", lambda dialog: (noticed.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda message: noticed.append(message.text))
    page.on("pageerror", lambda error: noticed.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    requests: list[str] = []

    def open_page(html: str):
        path = tmp_path / "page.html"
        path.write_text(html, "utf-8")
        page.goto(path.as_uri())
        page.wait_for_selector(READY)
        page.wait_for_selector("article .t")
        return page

    yield open_page
    context.close()
    assert noticed == []
    assert all(url.startswith("file://") for url in requests) and requests


def html_of(record, **options) -> str:
    return page_html(record, [Side("mine", record.about, len(record.responses))], **options)


def token(page, response: int, position: int):
    return page.locator(f'article[data-n="{response}"] .t').nth(position)


def panel_values(page, column: int = 0) -> dict[str, str]:
    rows = page.locator("#panel .values tr[data-signal]").all()
    return {r.get_attribute("data-signal"): r.locator("td").nth(column).inner_text() for r in rows}


def listed(page) -> list[int]:
    return [int(item.get_attribute("data-n")) for item in page.locator("#list li").all()]


def current(page) -> int:
    return int(page.locator("article.current").get_attribute("data-n"))


def background(page, response: int, position: int) -> str:
    return token(page, response, position).evaluate("e => e.style.backgroundColor")


def lightness(page, response: int, position: int) -> int:
    return sum(map(int, background(page, response, position)[4:-1].replace(",", " ").split()))


def test_hovering_shows_every_signal_as_recorded(show):
    record = written_by_hand()
    page = show(html_of(record))
    for n, t in ((0, 0), (0, 2), (1, 3)):
        token(page, n, t).hover()
        row = record.starts[n] + t
        shown = panel_values(page)
        for name in SIGNALS:
            value = record.signals[name][row]
            if np.isnan(value):
                assert shown[name] == "unknown"
            else:
                told = float(shown[name].replace("−", "-"))
                assert told == pytest.approx(value, abs=1e-4), name
        for who, ranks_T in (
            ("student", record.student_rank_T),
            ("teacher", record.teacher_rank_T),
        ):
            assert shown[f"{who}_rank"] == str(ranks_T[row] or "unknown")
    # A value of which steps of 1e-4 would leave nothing.
    token(page, 0, 0).hover()
    assert panel_values(page)["engine_mismatch"] == "1.00e−5"


def test_the_panel_has_both_models_most_probable_tokens(show):
    """The student's are put together from both lists; where there are none, it says why."""
    record = written_by_hand()
    record.signals["reverse_kl"] -= 2  # below what is notable by itself
    page = show(html_of(record))
    token(page, 0, 2).hover()
    teacher = page.locator('#panel table[data-of="teacher"] tr').all_inner_texts()
    student = page.locator('#panel table[data-of="student"] tr').all_inner_texts()
    assert [line.split()[0] for line in teacher[1:]] == ["the", "sum", "of", "both", "is"]
    assert teacher[1].split() == ["the", "40.0", "%", "10.0", "%"]
    assert [line.split()[0] for line in student[1:]] == ["12", "sum", "the", "of", "is"]
    assert student[1].split() == ["12", "0.1", "%", "50.0", "%"]
    assert page.locator("#panel .sampled").count() == 2  # " of", in both tables
    token(page, 0, 0).hover()
    assert (
        "H = 0.1000 is below τ = 0.8 nats, and reverse KL below 1"
        in page.locator("#panel .none").inner_text()
    )


def test_what_a_page_has_left_out_is_said(show):
    record = written_by_hand()
    page = show(html_of(record, most=2))
    token(page, 0, 2).hover()
    assert "2 tokens of the highest teacher entropy" in page.locator("#panel .none").inner_text()
    page.locator("#facts summary").click()
    facts = page.locator("#facts").inner_text()
    assert "of 2 tokens, top 5 of each model, where H ≥ τ or reverse KL ≥ 1" in facts
    assert "the highest teacher entropies of the 3 recorded" in facts
    for text in ("models/student", "models/teacher", "τ = 0.8", "temperature 1", "2 responses"):
        assert text in facts


def test_six_keys_and_buttons_colour_tokens(show):
    """Larger values have darker colours; the signed signal two; what is unknown is hatched."""
    record = written_by_hand()
    record.signals["reverse_kl"][:] = np.linspace(0, 1, 9)
    page = show(html_of(record))
    for n, name in enumerate(COLOURS):
        page.keyboard.press(str(n + 1))
        assert page.locator('[aria-pressed="true"][data-signal]').get_attribute("data-signal") == (
            name
        )
        legend = page.locator("#legend").inner_text()
        assert SIGNALS[name].label in legend and SIGNALS[name].unit in legend
        values_T = record.signals[name]
        low, high = int(np.nanargmin(values_T[:5])), int(np.nanargmax(values_T[:5]))
        assert background(page, 0, low) != background(page, 0, high)
    unknown = token(page, 1, 3)
    assert "unknown" in unknown.get_attribute("class") and background(page, 1, 3) == ""
    page.locator('[data-signal="reverse_kl"]').first.click()
    light = [lightness(page, 0, t) for t in range(5)]
    assert light == sorted(light, reverse=True) and light[0] > light[4]


def test_dark_pages_grow_lighter_with_the_value(show):
    record = written_by_hand()
    page = show(html_of(record))
    before = background(page, 0, 2)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("() => DARK.matches")
    for _ in range(100):  # the page hears of it a moment later
        if background(page, 0, 2) != before:
            break
        page.wait_for_timeout(20)
    assert background(page, 0, 2) != before
    assert lightness(page, 0, 0) < lightness(page, 0, 2)


def test_values_that_are_not_finite_are_shown_as_such(show):
    """At the token, in colours and legend, in means, and as the worst in the order."""
    record = with_infinite_values()
    page = show(html_of(record, signal="reverse_kl"))
    token(page, 1, 0).hover()
    shown = panel_values(page)
    assert (shown["reverse_kl"], shown["teacher_logprob"]) == ("∞", "−∞")
    assert (shown["engine_mismatch"], shown["forward_kl"]) == ("−∞", "3.5000")
    classes = [token(page, 1, t).get_attribute("class").split() for t in range(4)]
    assert ["infinite" in each for each in classes] == [True, False, False, False]
    assert ["unknown" in each for each in classes] == [False, True, False, False]
    light = [lightness(page, n, t) for n, t in ((1, 0), (1, 3), (0, 4), (0, 0))]
    assert light == sorted(light) and light[0] < light[1]  # darker than the largest other
    assert "infinite" in page.locator("#legend").inner_text() and "≥ 3" in legend_of(page)
    page.keyboard.press("6")
    assert background(page, 1, 0) and "∞" in page.locator("#legend").inner_text()
    page.keyboard.press("4")
    assert "∞" not in page.locator("#legend").inner_text()
    values = record.signals["reverse_kl"]
    means = [np.mean(values[:5]), np.mean(values[7:9])]
    items = page.locator("#list li").all_inner_texts()
    assert f"rkl {means[0]:.2f} ·" in items[0] and f"rkl {means[1]:.2f} 1×∞ ·" in items[1]
    head = page.locator('article[data-n="1"] h3').inner_text()
    assert f"reverse KL {means[1]:.4f} (1 infinite)" in head
    record.signals["reverse_kl"][:5] = 9.0
    page = show(html_of(record))
    page.select_option("#sort", "worst reverse KL")
    assert listed(page) == [1, 0]
    token(page, 0, 2).hover()
    student = page.locator('#panel table[data-of="student"] tr').all_inner_texts()
    assert [line.split()[0] for line in student[1:]] == ["12", "sum", "the", "of", "both"]
    assert student[1].split() == ["12", "0.0", "%", "50.0", "%"]


def legend_of(page) -> str:
    return page.locator("#legend .ramp").inner_text()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_page_on_which_nothing_is_finite_opens(show, value):
    """In all colours, with strips and orders."""
    record = written_by_hand()
    for values_T in record.signals.values():
        values_T[:] = value
    page = show(html_of(record))
    for n in range(len(COLOURS)):
        page.keyboard.press(str(n + 1))
        marked = "unknown" if np.isnan(value) else "infinite"
        assert marked in token(page, 0, 0).get_attribute("class").split()
    page.select_option("#sort", "worst forward KL")
    token(page, 0, 0).hover()
    told = "unknown" if np.isnan(value) else "∞" if value > 0 else "−∞"
    assert panel_values(page)["student_entropy"] == told


def test_divergences_from_a_teachers_top_k_are_shown_as_bounds(show):
    """On the buttons, in legend, panel, means; of two runs of the one alone that has them so."""
    exact = written_by_hand()
    record = replace(exact, about=replace(exact.about, payload="topk"))
    page = show(html_of(record))
    for key, name in (("3", "reverse_kl"), ("4", "forward_kl")):
        page.keyboard.press(key)
        label = f"{SIGNALS[name].label}, at least"
        assert page.locator("#legend b").inner_text() == label
        assert label in page.locator(f'#signals [data-signal="{name}"]').inner_text()
    token(page, 0, 0).hover()
    assert panel_values(page)["reverse_kl"] == "at least 2.0000"
    assert panel_values(page)["student_entropy"] == "4.0000"
    assert "reverse KL at least 2.2000" in page.locator('article[data-n="0"] h3').inner_text()
    assert "rkl ≥2.20" in page.locator("#list li").first.inner_text()
    assert "reverse KL at least 2.40" in page.locator("#facts summary").inner_text()
    both = page_html(
        beside(exact, record), [Side("mine", exact.about, 2), Side("other", record.about, 2)]
    )
    page = show(both)
    page.keyboard.press("3")
    assert page.locator("#legend b").inner_text() == "reverse KL, of B at least"
    token(page, 0, 0).hover()
    assert panel_values(page, 0)["reverse_kl"] == "2.0000"
    assert panel_values(page, 1)["reverse_kl"] == "at least 2.0000"


def test_the_table_of_the_index_is_as_wide_as_a_screen(browser, tmp_path):
    """Of a run with long names, two tasks and several runs beside them: 1200 px, and only the first
    column is broken into lines."""
    run = tmp_path / "a_run_with_a_rather_long_name_2026-11-27"
    for iteration in (20, 120):
        write_tokens(training_file(run, iteration), make_record(((900,) * 8,), iteration=iteration))
    for task in ("countdown", "a_task_with_a_rather_long_name_of_its_own"):
        record = make_record(((900,) * 8,), kind="evaluation", iteration=120, task=task)
        record.signals["reverse_kl"][0] = np.inf
        verdicts = tuple(r._replace(verdict="right") for r in record.responses)
        path = evaluation_file(run / "evaluations/000120", task)
        write_tokens(path, replace(record, responses=verdicts))
        for place in ("x", "another_folder_with_a_long_name"):
            other = tmp_path / place / run.name
            write_tokens(evaluation_file(other / "evaluations/000120", task), record)
    view.main([str(run)])
    for place in ("x", "another_folder_with_a_long_name"):
        view.main([str(run), "--evaluation", "120", "--compare", str(tmp_path / place / run.name)])
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.goto((run / "view/index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    assert page.locator("td small").count() == 2
    heights = page.locator("td:not(:has(small))").evaluate_all(
        "all => all.map(e => { const r = document.createRange(); r.selectNodeContents(e);"
        " return r.getBoundingClientRect().height; })"
    )
    assert max(heights) < 30
    assert page.locator("tbody a").count() == 4 + 4
    page.locator("tbody a", has_text="beside").first.click()
    page.wait_for_selector(READY)
    page.close()


def test_siblings_are_marked_where_they_part(show):
    """The first two tokens are shared: dimmed; the third is marked, and buttons lead there."""
    page = show(html_of(written_by_hand()))
    for n in (0, 1):
        classes = [token(page, n, t).get_attribute("class").split() for t in range(4)]
        assert ["same" in each for each in classes] == [True, True, False, False]
        assert ["fork" in each for each in classes] == [False, False, True, False]
    rows = page.locator(".forks tr").all()
    assert [row.locator(".before").inner_text().strip() for row in rows] == ["the sum"] * 2
    assert rows[1].locator(".after").inner_text().strip().startswith("is so")
    borders = [row.locator(".after").bounding_box()["x"] for row in rows]
    assert borders[0] == borders[1]
    page.locator('article[data-n="1"] .jump').click()
    assert "pinned" in token(page, 1, 2).get_attribute("class")
    assert "position 2 of 4" in page.locator("#panel").inner_text()


def test_what_is_left_out_between_siblings_has_a_sign(show):
    """At both ends; equal responses have one row, and the whole of it where all are equal."""
    record = make_record(((60, 60, 60), (9, 9)), shared=20)
    ids_T = record.ids_T.copy()
    ids_T[120:180] = ids_T[:60]  # the third response is the first one
    ids_T[189:] = ids_T[180:189]
    page = show(html_of(replace(record, ids_T=ids_T)))
    tables = [page.locator("section").nth(n).locator(".forks") for n in (0, 1)]
    assert tables[0].locator("th").all_inner_texts() == ["0 = 2", "1"]
    for end, sign in ((".before", "startsWith"), (".after", "endsWith")):
        found = (
            tables[0]
            .locator(end)
            .evaluate_all(
                f"all => all.map(e => e.textContent.{sign}('…') "
                "&& getComputedStyle(e).textOverflow === 'ellipsis')"
            )
        )
        assert found == [True, True]
    page.locator("#list li").nth(3).click()
    tables[1].wait_for()
    assert tables[1].locator("td").all_inner_texts() == ["the same tokens"]
    assert tables[1].locator("th").all_inner_texts() == ["0 = 1"]


def beside_one_without_a_gate() -> str:
    """Of 2 responses each, A has 2 right and B has 1."""
    a = written_by_hand()
    b = replace(a, about=replace(a.about, objective="opd", gate="never"))
    verdicts = (("right", "right"), ("wrong", "right"))
    graded = [
        replace(
            each,
            responses=tuple(
                r._replace(verdict=verdict) for r, verdict in zip(each.responses, own, strict=True)
            ),
        )
        for each, own in zip((a, b), verdicts, strict=True)
    ]
    return page_html(beside(*graded), [Side("mine", a.about, 2), Side("other", b.about, 2)])


def test_what_is_right_and_what_was_the_objective_is_told_of_each_run(show):
    page = show(beside_one_without_a_gate())
    head = page.locator("#facts summary").inner_text()
    ours, theirs = head.split("B: ")
    assert "A: eopd · τ 0.8 · 2 of 2 right · gate 0.33" in ours
    assert theirs.startswith("opd · no gate · 1 of 2 right · reverse KL")
    page.locator("#facts summary").click()
    facts = page.locator("#facts dl").inner_text()
    assert "2 of 2 right" in facts and "1 of 2 right" in facts and "3 of 4" not in facts


def test_an_objective_without_a_gate_is_shown_without_one(show):
    page = show(beside_one_without_a_gate())
    assert "gated" in token(page, 0, 2).get_attribute("class")
    assert "gated" not in token(page, 2, 2).get_attribute("class")
    token(page, 0, 0).hover()
    assert (panel_values(page, 0)["gate"], panel_values(page, 1)["gate"]) == ("0", "no gate")
    assert "means: no gate · reverse KL" in page.locator('article[data-n="2"] h3').inner_text()
    items = page.locator("#list li").all_inner_texts()
    assert ["gate" in each for each in items] == [True, False] * 2


def test_the_teacher_is_named_where_there_are_several(show):
    record = written_by_hand()
    prompts = tuple(prompt._replace(teacher="first") for prompt in record.prompts)
    names = ({"first": "x"}, {"first": "x", "second": "y"})
    found = []
    for teachers in names:
        about = replace(record.about, teachers=teachers)
        page = show(html_of(replace(record, about=about, prompts=prompts)))
        found.append(page.locator(".prompt h2").inner_text())
    assert found == [
        "prompt 0 4 tokens · answer 19",
        "prompt 0 4 tokens · answer 19 · teacher first",
    ]


def test_a_page_leads_to_others(show):
    page = show(html_of(written_by_hand(), links={"all recordings": "index.html", "next": "b%20c"}))
    links = page.locator("#links a").evaluate_all("all => all.map(e => e.getAttribute('href'))")
    assert links == ["index.html", "b%20c"]


def test_two_runs_stand_beside_each_other(show):
    """B's response to the same prompt is a sibling, and the panel has both runs' values where the
    tokens before are the same; c hides and shows them."""
    a = written_by_hand()
    b = replace(a, signals={name: values_T + 1 for name, values_T in a.signals.items()})
    b = replace(b, ids_T=np.where(np.arange(9) == 1, a.ids_T + 9, a.ids_T).astype(np.int32))
    html = page_html(beside(a, b), [Side("mine", a.about, 2), Side("other", b.about, 2)])
    page = show(html)
    assert len(listed(page)) == 4 and page.locator(".badge.side", has_text="B").count() >= 2
    token(page, 1, 1).hover()  # the other sample of B goes on as this one
    ours, theirs = panel_values(page, 0), panel_values(page, 1)
    assert float(theirs["student_entropy"]) == pytest.approx(float(ours["student_entropy"]) + 1)
    token(page, 1, 3).hover()
    assert panel_values(page, 1)["student_entropy"] != ""
    token(page, 0, 4).hover()  # behind the fork
    assert panel_values(page, 1)["student_entropy"] == "nats"
    page.keyboard.press("c")
    assert len(listed(page)) == 2 and page.locator("article:visible").count() == 2
    assert page.locator(".forks tr").count() == 2
    page.keyboard.press("c")
    assert len(listed(page)) == 4
    page.wait_for_selector('article[data-n="3"] .t')


def test_responses_are_sorted(show):
    record = make_record(((30, 40), (50, 20)), seed=4)
    page = show(html_of(record))
    cuts = list(zip(record.starts, record.starts[1:], strict=False))
    assert listed(page) == [0, 1, 2, 3]
    for option, name in (
        ("most gated", "gate"),
        ("worst reverse KL", "reverse_kl"),
        ("worst forward KL", "forward_kl"),
    ):
        page.select_option("#sort", option)
        means = [record.signals[name][begin:end].mean() for begin, end in cuts]
        assert listed(page) == np.argsort(means)[::-1].tolist()
    page.select_option("#sort", "longest")
    assert listed(page) == [2, 1, 0, 3]
    groups = page.locator("section").all()
    assert [g.locator("article").first.get_attribute("data-n") for g in groups] == ["2", "0"]


def test_responses_are_filtered(show):
    record = make_record(((30, 40), (50, 20)))
    verdicts = ("right", "wrong", "right", "no answer")
    graded = zip(record.responses, verdicts, strict=True)
    responses = [r._replace(verdict=verdict) for r, verdict in graded]
    responses[2] = responses[2]._replace(source="reference")
    page = show(html_of(replace(record, responses=tuple(responses))))
    for name, expected in (("cut off", [1, 3]), ("wrong", [1, 3]), ("reference", [2])):
        page.locator(f'#filters input[name="{name}"]').check()
        assert listed(page) == expected
        assert page.locator("article:visible").count() == len(expected)
        page.locator(f'#filters input[name="{name}"]').uncheck()
    assert listed(page) == [0, 1, 2, 3]


def test_there_is_no_filter_for_what_nobody_asked(show):
    page = show(html_of(make_record()))
    assert page.locator("#filters input").evaluate_all("all => all.map(e => e.name)") == ["cut off"]


def test_search_finds_text_across_tokens(show):
    """« is so » is two tokens of one response; Enter, n and N go from match to match."""
    page = show(html_of(written_by_hand()))
    page.keyboard.press("/")
    page.keyboard.type("IS so")
    page.keyboard.press("Enter")
    assert listed(page) == [1]
    assert page.locator(".t.hit").all_inner_texts() == [" is", " so"]
    assert "pinned" in token(page, 1, 2).get_attribute("class")
    page.fill("#search", "the sum")
    page.wait_for_function("() => document.querySelectorAll('#list li').length === 2")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert current(page) == 0
    page.keyboard.press("n")
    assert current(page) == 1
    page.keyboard.press("N")
    assert current(page) == 0
    page.fill("#search", "question 0")  # of the prompt
    page.wait_for_function("() => document.getElementById('found').textContent.startsWith('0')")
    assert listed(page) == [0, 1]
    page.fill("#search", "nowhere")
    page.wait_for_selector("#nothing")


def test_keys_go_from_response_to_response(show):
    page = show(html_of(make_record(((30, 40), (50, 20)))))
    seen = []
    for key in ("j", "j", "j", "ArrowRight", "ArrowLeft", "k", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        seen.append(current(page))
    assert seen == [0, 1, 2, 3, 2, 1, 1, 0]
    page.keyboard.press("i")
    content = token(page, 0, 0).evaluate("e => getComputedStyle(e, '::after').content")
    assert token(page, 0, 0).get_attribute("data-id") in content
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_the_prompt_stays_in_sight(show):
    """Whole where the response leaves room for it, else as a line over the response."""
    record = make_record(((30, 30, 30), (50, 1500)))
    text = "<b>first line\nof the question</b> " + "and more " * 99
    record = replace(record, prompts=(record.prompts[0], record.prompts[1]._replace(text=text)))
    page = show(html_of(record))

    def top_of(selector: str) -> float:
        edge = page.locator("main").bounding_box()["y"]
        return page.locator(selector).first.bounding_box()["y"] - edge

    for n, is_whole in ((0, True), (1, True), (2, False), (3, True), (4, False)):
        page.keyboard.press("j")
        page.wait_for_timeout(100)
        assert current(page) == n
        assert (top_of("section:has(.response.current) .prompt") >= 0) == is_whole
        reminder = page.locator("section:has(.response.current) .reminder")
        assert reminder.is_visible() != is_whole
        if not is_whole:
            bottom = reminder.bounding_box()["y"] + reminder.bounding_box()["height"]
            heading = page.locator(".response.current h3").bounding_box()
            assert 0 <= heading["y"] - bottom < 30
    assert reminder.inner_text().startswith("prompt 1 <b>first line of the question</b> and more")
    assert reminder.bounding_box()["height"] < 30


@pytest.mark.parametrize("width", [1300, 800])
def test_no_colour_moves_the_text(show, width):
    record = make_record(((300, 200),))
    record.signals["engine_mismatch"] = np.linspace(-4e-6, 4e-6, 500, dtype=np.float32)
    page = show(html_of(record))
    page.set_viewport_size({"width": width, "height": 800})
    tops = set()
    for n in range(len(COLOURS)):
        page.keyboard.press(str(n + 1))
        tops.add(page.locator("#nav").bounding_box()["height"])
        assert page.locator("#legend").evaluate("e => e.scrollWidth <= e.clientWidth")
    assert len(tops) == 1


def test_rounding_of_the_engine_has_no_strong_colour(show):
    """4e-6 nats are next to nothing on a scale to 1e-3, whose ends cover no other text."""
    record = make_record(((51,),))
    record.signals["engine_mismatch"] = np.linspace(-4e-6, 4e-6, 51, dtype=np.float32)
    page = show(html_of(record))
    page.keyboard.press("6")
    assert legend_of(page).split("\n")[0].startswith("≤ −0.001")
    assert {background(page, 0, t) for t in (0, 25, 50)} == {"rgb(255, 255, 255)"}
    what = page.locator("#legend > span").first.bounding_box()
    assert what["x"] + what["width"] <= page.locator("#legend .ramp span").first.bounding_box()["x"]


def test_the_words_of_the_page_are_explained(show):
    page = show(html_of(make_record(((30, 40),))))
    assert page.locator("#list li").first.get_attribute("title").startswith("prompt 0, sample 0")
    assert "begins as prompt 0, sample 1, for 4 tokens" in (
        page.locator('article[data-n="0"] .jump').get_attribute("title")
    )
    page.keyboard.press("?")
    told = page.locator("#help").inner_text()
    assert all(
        f"{word}\n" in told for word in ("log q", "log p", "loss", "5449.0", "gate, rkl, fkl")
    )


def test_on_a_narrow_window_the_panel_leaves_the_token_in_sight(show):
    """Wherever on the page it is, with the signals in two columns and without a sideways scroll."""
    page = show(html_of(make_record(((400, 300),))))
    page.set_viewport_size({"width": 800, "height": 700})
    assert page.locator("#list").bounding_box()["height"] <= 70
    for n, t in ((0, 5), (0, 200), (1, 150), (1, 299)):
        page.evaluate("unpin()")
        token(page, n, t).evaluate("e => e.scrollIntoView({ block: 'end' })")
        page.evaluate("scrollBy(0, 330)")  # to the bottom of the window: without the margin
        token(page, n, t).click()
        box = token(page, n, t).bounding_box()
        panel = page.locator("#panel").bounding_box()
        nav = page.locator("#nav").bounding_box()
        assert nav["y"] + nav["height"] <= box["y"] and box["y"] + box["height"] <= panel["y"]
    rows = page.locator("#panel .values tr").all()
    assert rows[0].bounding_box()["y"] == rows[1].bounding_box()["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 800


def test_the_strip_leads_to_a_token_and_shows_the_threshold(show):
    """A click at three quarters of its width holds the token there, in view; the line of τ is drawn
    for entropies, and not for others."""
    record = make_record(((2000, 400),))
    page = show(html_of(record))
    strip = page.locator('article[data-n="0"] .strip')
    box = strip.bounding_box()
    strip.click(position={"x": box["width"] * 0.75 + 0.5, "y": 20})
    pinned = page.locator(".t.pinned")
    assert abs(pinned.evaluate("e => e.n") - 1500) <= 2
    top = pinned.bounding_box()["y"]
    assert 0 < top < 800
    assert "position 15" in page.locator("#panel").inner_text()

    def red_dots() -> int:
        """Of the colour of the line, in the row of the canvas that has most."""
        return page.evaluate("""() => {
          const canvas = document.querySelector('article[data-n="0"] .strip');
          const { width, height } = canvas;
          const copy = new OffscreenCanvas(width, height).getContext("2d");
          copy.drawImage(canvas, 0, 0);
          const dots = copy.getImageData(0, 0, width, height).data;
          let most = 0;
          for (let y = 0; y < height; y++) {
            let count = 0;
            for (let x = 0; x < width; x++) {
              const at = 4 * (y * width + x);
              if (dots[at] > 180 && dots[at + 1] < 150 && dots[at + 2] < 170) count++;
            }
            most = Math.max(most, count);
          }
          return most;
        }""")

    assert red_dots() > 100
    page.keyboard.press("3")
    assert red_dots() < 100


def test_hostile_text_is_shown_and_does_nothing(show):
    """No dialog, no request, no console message (`show` asserts it), and every token stands there
    as text, without a control character or a mark of direction."""
    record = hostile_record()
    html = page_html(record, [Side("<img src=x onerror=alert(9)>\u202e", record.about, 1)])
    page = show(html)
    texts = page.locator("article .t").evaluate_all("all => all.map(e => e.innerText)")
    assert "<script>alert(1)</script>" in texts and "</script><script>alert(2)</script>" in texts
    assert "<img src=x" in texts[2] and texts[3].strip() == "onerror=alert(3)>"
    for shown in ("␛[31mred␛[0m", "␀␇␍", "⟨FF⟩", "⟨E4 BD⟩", "你", "😀", "⟨ED A0 80⟩", "{{script}}"):
        assert shown in texts
    assert "[U+202E]evil[U+202C]" in texts and "[U+2066][U+200B][U+0085][U+FEFF][U+2028]" in texts
    for t in range(0, len(HOSTILE), 4):
        token(page, 0, t).hover()
    page.locator("#facts summary").click()
    everything = page.locator("body").evaluate(
        "e => [...e.querySelectorAll('header, nav, main, aside')].map(x => x.textContent).join('')"
    )
    assert "<script>alert(4)</script>␛[2J[U+202E]" in everything
    assert not any(mark in everything for mark in "\x00\x1b\x07\u202e\u202c\u2066\u200b\u2028")
    assert page.locator("img").count() == 0
    assert page.title() == "120 · <img src=x onerror=alert(9)>\u202e"


def test_tokens_are_read_as_for_the_terminal(show):
    """Random bytes, with whole and broken characters: the same parts from both readers."""
    page = show(html_of(written_by_hand()))
    draw = np.random.default_rng(0)
    pool = (
        "a \n\t\x1b\x7f\x85é你😀\u202e\u200d\u00a0\ufeff\u3164\ue000\u2028".encode()
        + b"\xff\xc0\xed\xa0"
    )
    content = b"".join(
        pool[begin : begin + size] for begin, size in draw.integers(1, len(pool), (200, 2)).tolist()
    )
    cuts = np.unique(draw.integers(1, len(content), 1500)).tolist()
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    reader = Reader()
    expected = [[list(part) for part in reader.read(Piece(each, False))] for each in pieces]
    found = page.evaluate(
        """pieces => {
          const read = makeReader();
          return pieces.map(bytes => read({ bytes: Uint8Array.from(bytes) }).parts);
        }""",
        [list(each) for each in pieces],
    )
    assert found == expected
    assert {part[0] for parts in found for part in parts} == {"text", "mark", "newline", "hex"}


def test_injected_script_is_refused(browser, tmp_path):
    """The page's policy holds should markup ever get in."""
    html = html_of(written_by_hand()).replace(
        "<header>", "<script>document.title = 'taken'</script><header onclick='x()'>"
    )
    path = Path(tmp_path / "page.html")
    path.write_text(html, "utf-8")
    page = browser.new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.goto(path.as_uri())
    page.wait_for_selector(READY)
    assert page.title() != "taken" and any("Content Security Policy" in text for text in told)
    page.close()


def test_a_page_of_a_real_run_opens(show):
    """An eighth of 128 responses: all of it is there, and little of it in the document; what is far
    appears when it is asked for, in view."""
    record = big_record(responses=16)
    html = html_of(record)
    assert len(html) < 25e6 / 8
    page = show(html)
    assert len(listed(page)) == 16
    assert page.locator("article .t").count() < 5 * 4096
    page.locator("#list li").nth(13).click()
    page.wait_for_selector('article[data-n="13"] .t')
    strip = page.locator('article[data-n="13"] .strip')
    assert 0 < strip.bounding_box()["y"] < 400
    width = strip.bounding_box()["width"]
    strip.click(position={"x": width / 2, "y": 10})
    page.wait_for_timeout(300)
    assert 0 < page.locator(".t.pinned").bounding_box()["y"] < 800
    assert page.locator("article .t").count() < 8 * 4096


RECORDED = Path(__file__).parent / "recorded"


@pytest.mark.parametrize("name", ["quickstart_000260.tokens", "qwen3_vocabulary"])
def test_recordings_of_real_runs_are_shown(show, name):
    """Of the quick start, and of a run with Qwen3's 151,936 columns: all six colours, what is
    pointed at, and every order."""
    record = read_tokens(RECORDED / f"{name}.npz")
    page = show(html_of(record))
    row = int(record.top_rows_G[0])
    response = max(n for n, start in enumerate(record.starts[:-1]) if start <= row)
    position = row - record.starts[response]
    for n, signal in enumerate(COLOURS):
        page.keyboard.press(str(n + 1))
        pressed = page.locator('[aria-pressed="true"][data-signal]')
        assert pressed.get_attribute("data-signal") == signal
        values_T = record.signals[signal]
        if np.isnan(values_T).all():  # of an evaluation: nobody kept what the engine said
            assert "unknown" in token(page, response, position).get_attribute("class")
        else:
            shades = {background(page, response, t) for t in range(16)}
            assert len(shades) > 1 or signal == "gate", signal
    token(page, response, position).hover()
    values = panel_values(page)
    for signal in SIGNALS:
        expected = record.signals[signal][row]
        if np.isnan(expected):
            assert values[signal] == "unknown"
        else:
            assert float(values[signal].replace("−", "-")) == pytest.approx(expected, abs=1e-4)
    assert page.locator('#panel table[data-of="teacher"] tr').count() == 6
    means = {
        label: [
            float(record.signals[column][start:end].mean())
            for start, end in pairwise(record.starts)
        ]
        for label, column in (
            ("worst reverse KL", "reverse_kl"),
            ("worst forward KL", "forward_kl"),
        )
    }
    for label, each in means.items():
        page.select_option("#sort", label)
        assert listed(page) == sorted(range(len(each)), key=lambda n: -each[n])


def test_the_quick_start_stands_beside_its_beginning(show):
    """The same seeds on the same problems, with 260 iterations between them."""
    first, last = (
        read_tokens(RECORDED / f"quickstart_{n}.tokens.npz") for n in ("000000", "000260")
    )
    both = beside(last, first)
    sides = [
        Side("end", last.about, len(last.responses)),
        Side("begin", first.about, len(both.responses) - len(last.responses)),
    ]
    page = show(page_html(both, sides))
    assert len(listed(page)) == 16
    token(page, 0, 0).hover()
    for column, record in enumerate((last, first)):
        value = panel_values(page, column)["student_entropy"]
        expected = record.signals["student_entropy"][0]
        assert float(value) == pytest.approx(expected, abs=1e-4)
    page.keyboard.press("c")
    assert len(listed(page)) == 8


def test_what_the_teacher_reads_stands_under_the_prompt(show):
    """Of a prompt that it reads otherwise; markup in it does nothing."""
    record = make_record()
    shown = record.prompts[0]._replace(read_by_teacher="<b>the sum</b> is\n19")
    page = show(html_of(replace(record, prompts=(shown, *record.prompts[1:]))))
    told = page.locator(".prompt details")
    assert told.count() == 1
    told.locator("summary").click()
    assert "<b>the sum</b> is" in told.inner_text() and told.locator("b").count() == 0
