"""Mathematics: which problems a source has, and whether answers are judged as a person would."""

import json
import pickle
import random
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eopd.data.boxed import last_box
from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.grading_pool import GradingPool, check_answers
from megatron_eopd.tasks.math import PRESETS, MathTask, last_number, plain_number
from megatron_eopd.tasks.registry import row_of
from megatron_eopd.tasks.task import Grade, Verdict
from tests.real_data import real_data

GOLDEN = Path(__file__).parent / "golden/math_answers.jsonl"
MATH = MathTask("math")
NUMBER = MathTask("number", preset="number")


def boxed(answer: str) -> str:
    return rf"The answer is $\boxed{{{answer}}}$."


# --- boxes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,expected",
    [
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\frac{1}{2}} m", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"$\boxed 5$ is it", "5"),
        (r"\boxed 12" + "\nso", "12"),
        (r"\boxed{1} \boxed{}", None),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{1} \boxed{\frac{2}{3}", None),
        (r"\boxed{1} \boxed{\}", None),
        (r"\boxed", None),
        (r"\boxedx{5}", None),
        ("5", None),
    ],
)
def test_the_last_box_counts(text, expected):
    """And no other, where it is empty or open."""
    assert last_box(text) == expected


@pytest.mark.parametrize("piece", [r"\boxed{", r"\boxed{1}", "{", r"\{", "1,", "x+", " ", "a "])
def test_long_texts_take_linear_time(piece):
    """100 kB of anything; a quadratic step would take minutes."""
    text = piece * (100_000 // len(piece))
    start = time.perf_counter()
    for task in (MATH, NUMBER):
        for response in (text, boxed(text), text + boxed("5")):
            task.grade("5", response)
    assert time.perf_counter() - start < 5


# --- judgements ---------------------------------------------------------------------------------


def golden_cases() -> list[dict]:
    cases = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    for case in cases:
        if isinstance(case["response"], list):  # texts, and [text, how often]
            parts = [[p, 1] if isinstance(p, str) else p for p in case["response"]]
            case["response"] = "".join(text * times for text, times in parts)
    return cases


def test_golden_answers():
    """As a careful person judges each, and as the second grader is known to."""
    cases = golden_cases()
    with GradingPool([MATH]) as pool:
        futures = [pool.submit(MATH, case["gold"], case["response"]) for case in cases]
        grades = [future.result() for future in futures]
    wrong = [
        f"{case['note']}: {case['gold'][:40]} | {case['response'][:80]} | expected "
        f"{case['verdict']}, second {case.get('second', 'either')}; got {grade}"
        for case, grade in zip(cases, grades, strict=True)
        if case["verdict"] != grade.verdict or case.get("second", grade.second) != grade.second
    ]
    assert not wrong, "\n".join(wrong)
    assert len(cases) >= 360


@given(
    st.fractions(max_denominator=1000, min_value=-(10**6), max_value=10**6),
    st.fractions(max_denominator=1000, min_value=-(10**6), max_value=10**6),
)
def test_fractions_are_equal_when_their_values_are(first, second):
    """However they are written; the reference is Python's Fraction."""

    def spellings(value: Fraction) -> list[str]:
        sign = "-" * (value < 0)
        top, bottom = abs(value.numerator), value.denominator
        whole, rest = divmod(top, bottom)
        found = [rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"{sign}{3 * top}/{3 * bottom}"]
        if rest and whole:
            found.append(rf"{sign}{whole}\dfrac{{{rest}}}{{{bottom}}}")
        if 10**6 % bottom == 0:
            found.append(f"{sign}{top / bottom:,.6f}")
        return found

    for gold in spellings(first):
        for answer in spellings(second):
            is_right = MATH.grade(gold, boxed(answer)).verdict is Verdict.RIGHT
            assert is_right == (first == second), (gold, answer)


def test_canonical_spellings():
    """Right answers have the gold's; wrong ones one for equal answers."""

    def canonical(answer: str) -> str:
        return MATH.grade("7", boxed(answer)).canonical

    assert canonical("7.0") == "7"
    for several in (
        ("0.5", r"\frac12", r"\dfrac{2}{4}", "1/2"),
        (r"\sqrt{8}", r"\sqrt{ 8 }", r"2\sqrt2"),
        ("1, 2", r"\{2,1\}", r"2 \text{ and } 1"),
        ("(1,2)", r"\left(1,\,2\right)"),
        (r"\text{yes}", "Yes."),
        ("x=3", "3"),
    ):
        assert len({canonical(answer) for answer in several}) == 1, several
    assert len({canonical(answer) for answer in ("8", "-8", "1/8", r"\sqrt{8}", "(8,1)")}) == 5


def test_an_answer_is_never_run(tmp_path):
    """Nothing in it reaches Python's eval, which sympy's own reading of text uses."""
    victim = tmp_path / "victim"
    code = f"__import__('pathlib').Path('{victim}').touch()"
    for answer in (code, f"x+{code}", rf"\text{{{code}}}", f"({code}, 2)", f"x={code}"):
        for gold in ("5", "x+1", "(1,2)", "x=5", "No"):
            assert MATH.grade(gold, boxed(answer)).verdict is not Verdict.RIGHT
    assert not victim.exists()


# --- plain numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,expected",
    [
        ("The answer is 18.", "18"),
        ("#### 1,234", "1234"),
        ("$18.00", "18.00"),
        ("3-2", "2"),
        ("x = -5", "-5"),
        ("x = \N{MINUS SIGN}5", "-5"),
        ("5 - -3", "-3"),
        ("so 1,8", "8"),
        ("12,34", "34"),
        (".5 of it", ".5"),
        ("1,000,000 people", "1000000"),
        ("3*4*5=60!", "60"),
        ("9 apples, each of them red", "9"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=0, max_value=10**9, places=3))
def test_a_number_is_found_however_it_is_written(number):
    for text in (f"{number}", f"{number:,}", f"= ${number}.", f"7 {number} eggs", f"**{number}**"):
        assert NUMBER.grade(str(number), text).verdict is Verdict.RIGHT, text


@pytest.mark.parametrize(
    "gold,response,verdict",
    [
        ("18", "16 - 3 = 13, no: 18", Verdict.RIGHT),
        ("18", r"First 18, then \boxed{18 \text{ dollars}}, see step 7", Verdict.RIGHT),
        ("18", r"\boxed{x = 18}", Verdict.RIGHT),
        ("18", r"18 is \boxed{}", Verdict.NO_ANSWER),
        ("18", r"18 is \boxed{17}", Verdict.WRONG),
        ("18", r"18 is \boxed{eighteen}", Verdict.WRONG),
        ("0.5", r"\boxed{\frac{1}{2}}", Verdict.RIGHT),
        ("9", r"\boxed{x = 18/2}", Verdict.RIGHT),
        ("0.18", r"\boxed{18\%}", Verdict.RIGHT),
        ("1,800", r"\boxed{\$1800 \text{ a day}}", Verdict.RIGHT),
        *(
            ("18", rf"\boxed{{{answer}}}", Verdict.WRONG)
            for answer in (
                *("2^{18}", r"\sqrt{18}", "x>18", "17, 18", "17 - 18", "18 million"),
                *(r"5\cdot 18", r"\frac{1}{18}", "-18", "18+1", "at least 18"),
            )
        ),
        *(
            ("18", text, Verdict.WRONG)
            for text in ("1e18", "1/18", "17-18", "2^18", "$2^{18}$", r"$\frac{1}{18}$", "= -18")
        ),
        ("18", "so 36 / 2 = 18, or $18/day", Verdict.RIGHT),
        ("18", "eighteen", Verdict.NO_ANSWER),
        ("18", "", Verdict.NO_ANSWER),
        ("1000", "1,000.0", Verdict.RIGHT),
        ("9" * 28 + "1", "9" * 28 + "2", Verdict.WRONG),
        ("18", "9" * 100_000, Verdict.UNPARSABLE),
    ],
)
def test_numbers_are_graded(gold, response, verdict):
    assert NUMBER.grade(gold, response).verdict is verdict


@pytest.mark.parametrize(
    "answer,expected",
    [
        *(("18", 18), ("1,018", 1018), ("$5", 5), ("\N{MINUS SIGN}5", -5)),
        *((text, None) for text in ("3/4", "five", "", "2 or 3", "2^5")),
    ],
)
def test_an_answer_is_one_plain_number(answer, expected):
    assert plain_number(answer) == expected


# --- problems -----------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_problems_of_a_preset(preset, tmp_path):
    """In their order, with where they stand, and with the preset's words behind them."""
    gold = "so 6*7 #### 42" if preset == "gsm8k" else "42"
    rows = [
        {PRESETS[preset].prompts[0]: f"{n} * 7?", PRESETS[preset].answers[0]: gold} for n in "67"
    ]
    task = MathTask("t", write_rows(tmp_path / "rows.jsonl", rows), preset)
    problems = list(task.problems())
    assert problems == list(task.problems())
    suffix = PRESETS[preset].suffix
    assert [p.text for p in problems] == [f"{n} * 7?" + f"\n{suffix}" * bool(suffix) for n in "67"]
    assert [p.where for p in problems] == [f"{tmp_path}/rows.jsonl line {n}" for n in (1, 2)]
    assert {p.answer for p in problems} == {"42"}
    assert task.grade("42", task.right_response("42")).verdict is Verdict.RIGHT


@pytest.mark.parametrize("preset", PRESETS)
def test_teachers_may_be_shown_all_columns_of_a_problem(preset, tmp_path):
    """As those of a prompt file; the answer is the one that is graded."""
    names = PRESETS[preset].prompts[0], PRESETS[preset].answers[0]
    row = {names[0]: "6 * 7?", names[1]: "42.0 ", "solution": "6 times 7", "more": {"level": 5}}
    (problem,) = MathTask("t", write_rows(tmp_path / "rows.jsonl", [row]), preset).problems()
    columns = row_of(problem).columns
    assert (columns["solution"], columns["more"]) == ("6 times 7", {"level": 5})
    assert columns["answer"] == problem.answer == "42.0"


def test_the_suffix_can_be_another(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"problem": "6 * 7?", "answer": 42}])
    for suffix, text in (("Box it.", "6 * 7?\nBox it."), ("", "6 * 7?")):
        (problem,) = MathTask("t", source, "math500", suffix).problems()
        assert problem.text == text


def test_olympiadbench_has_lists_and_tolerances(tmp_path):
    rows = [
        {"question": "a?", "final_answer": ["$1$", "$2$"], "error": None},
        {"question": "b?", "final_answer": ["2.50"], "error": "1e-1"},
    ]
    task = MathTask("t", write_rows(tmp_path / "rows.jsonl", rows), "olympiadbench")
    first, second = task.problems()
    assert task.grade(first.answer, boxed("2, 1")).verdict is Verdict.RIGHT
    assert task.grade(first.answer, boxed("2")).verdict is Verdict.WRONG
    for answer, verdict in (
        ("2.6", Verdict.RIGHT),
        ("2.61", Verdict.WRONG),
        (r"\sqrt{6}", Verdict.RIGHT),
        (r"\sqrt{7}", Verdict.WRONG),
    ):
        assert task.grade(second.answer, boxed(answer)).verdict is verdict, answer
    assert task.grade(second.answer, task.right_response(second.answer)).verdict is Verdict.RIGHT


@pytest.mark.parametrize(
    "preset,rows,told",
    [
        ("math", [], "no problems"),
        ("math", [{"problem": "?"}], "line 1: no column with the answer: answer or"),
        ("math", [{"text": "?", "answer": "1"}], "line 1: no column with the problem: prompt or"),
        (
            "math",
            [{"problem": "?", "answer": answer} for answer in ("1", " ", "2", "", "")],
            "3 of 5 .* lines 2, 4-5",
        ),
        ("math", [{"problem": " ", "answer": "1"}], "1 of 1 .* line 1"),
        (
            "math",
            [{"problem": "?", "answer": None}, {"problem": "?", "answer": 0}],
            "1 of 2 .*line 1",
        ),
        ("math", [{"problem": "?", "answer": []}, {"problem": None, "answer": 1}], "lines 1-2"),
        ("number", [{"problem": "?", "answer": "1/2"}], "one plain number.* line 1"),
        ("gsm8k", [{"question": "?", "answer": "so ####"}], "one plain number.* line 1"),
    ],
)
def test_what_cannot_be_graded_is_told(preset, rows, told, tmp_path):
    """With file and lines, before a run begins."""
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=told) as info:
        list(MathTask("t", source, preset).problems())
    assert source in str(info.value)


def test_an_answer_must_be_readable(tmp_path):
    """More than its own spelling must be able to be right: what an integral comes to is no spelling
    of it. Words, points, bases and dots are readable."""
    readable = [r"\text{Evelyn}", "(1, x)", "52_8", r"\{2, 3\}", "x(x-1)...(x-9)", "2:3", "x=5"]
    answers = [*readable, r"\int_0^1", r"\frac{1}{", "2^{999999}"]
    rows = [{"problem": "?", "answer": answer} for answer in answers]
    task = MathTask("t", write_rows(tmp_path / "rows.jsonl", rows))
    problems = list(task.problems())
    with GradingPool([task]) as pool:
        with pytest.raises(ConfigError, match=r"3 of 10 .* lines 8-10\. The first is '.*int_0"):
            check_answers(task, problems, pool)
        check_answers(task, problems[: len(readable)], pool)


def test_no_expression_is_read_with_the_problems(tmp_path):
    """All ranks have those; an expression may be read for ever, so only processes with a limit
    do."""
    source = write_rows(tmp_path / "rows.jsonl", [{"problem": "?", "answer": r"\sqrt{2}+x"}])
    code = (
        "import sys; from megatron_eopd.tasks.math import MathTask; "
        f"list(MathTask('t', {source!r}).problems()); "
        "sys.exit('latex2sympy2_extended' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_source_is_needed_where_a_preset_has_none():
    with pytest.raises(ConfigError, match="champ knows no data set"):
        MathTask("t", None, "champ").problems()


def test_a_task_is_light():
    """To pickle, and to import: what grades starts at once, and sympy comes when it is needed."""
    task = MathTask("t", "rows.jsonl", "math500", "Box it.")
    assert pickle.loads(pickle.dumps(task)) == task
    heavy = {"torch", "transformers", "sympy", "datasets", "numpy"}
    code = f"import sys, megatron_eopd.tasks.math; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- real data ----------------------------------------------------------------------------------


def math500() -> MathTask:
    return MathTask("math500", str(real_data("math500/math500.jsonl")), "math500")


def grades_of(task: MathTask, pairs: list[tuple[str, str]]) -> list[Grade]:
    with GradingPool([task]) as pool:
        futures = [pool.submit(task, gold, response) for gold, response in pairs]
        return [future.result() for future in futures]


def require(task: MathTask, pairs: list[tuple[str, str]], verdict: Verdict) -> None:
    grades = grades_of(task, pairs)
    wrong = [(*pair, g) for pair, g in zip(pairs, grades, strict=True) if g.verdict is not verdict]
    assert not wrong, "\n".join(map(str, wrong))


def rewritten(answer: str, rng: random.Random) -> str:
    """As a model might write the same."""
    answer = answer.replace(r"\frac", rng.choice([r"\dfrac", r"\tfrac", r"\frac "]))
    answer = answer.replace(r"\left", "").replace(r"\right", "")
    if "," in answer and r"\!" not in answer and not re.fullmatch(r"\d{1,3}(,\d{3})+", answer):
        answer = re.sub(r",\s*", rng.choice([", ", r",\ ", ","]), answer)
    if answer.startswith("(") and rng.random() < 0.5 and r"\cup" not in answer:
        answer = re.sub(r"^\((.*),(.*)\)$", r"\\left( \1 , \2 \\right)", answer)
    if re.fullmatch(r"-?\d+", answer):
        units = ["", r"\text{ units}", ".0", r"\,\mathrm{cm}", ".", r" \text{ apples}"]
        answer = answer.replace("-", rng.choice("-−")) + rng.choice(units)
    return f" {answer} "


def test_math500():
    """Every answer is right as it stands, and rewritten, within a text that boxes something else
    before."""
    task, rng = math500(), random.Random(0)
    golds = [problem.answer for problem in task.problems()]
    assert len(golds) == 500
    with GradingPool([task]) as pool:
        check_answers(task, list(task.problems()), pool)
    pairs = [
        (gold, rf"Is it \boxed{{1}}? No: \[\boxed{{{rewritten(gold, rng)}}}\] I am sure.")
        for gold in golds
        for _ in range(3)
    ]
    require(task, pairs, Verdict.RIGHT)


def corrupted(answer: str, rng: random.Random) -> list[str]:
    """A digit changed, the sign flipped, parts swapped, one added."""
    found = []
    digits = [index for index, sign in enumerate(answer) if sign.isdigit()]
    if digits:
        index = rng.choice(digits)
        digit = str((int(answer[index]) + rng.randint(1, 9)) % 10)
        found.append(answer[:index] + digit + answer[index + 1 :])
    if not re.search(r"text|mbox|circ|begin|[,=]|cup|\\in |\\left|\\pm| - |[_%]", answer):
        found.append(f"{answer}+1")
        if answer != "0":
            found.append(answer[1:] if answer[0] == "-" else f"-{answer}")
    pair = re.compile(r"(?:\\left)?\s*([(\[])([^,]*),([^,]*?)(?:\\right)?\s*([)\]])")
    if match := pair.fullmatch(answer):
        found.append(f"{match[1]}{match[3]},{match[2]}{match[4]}")
    if match := re.fullmatch(r"(-?)\\d?frac\{(\w+)\}\{(\w+)\}", answer):
        found.append(rf"{match[1]}\frac{{{match[3]}}}{{{match[2]}}}")
    return found


def test_math500_with_mistakes():
    """Not one is right."""
    task, rng = math500(), random.Random(0)
    golds = [problem.answer for problem in task.problems()]
    pairs = [(gold, boxed(answer)) for gold in golds for answer in corrupted(gold, rng)]
    others = zip(golds, [*golds[7:], *golds[:7]], strict=True)
    plain = [(gold, other) for gold, other in others if gold != other and "=" not in other]
    pairs += [(gold, boxed(other)) for gold, other in plain]
    assert len(pairs) > 1_500
    require(task, pairs, Verdict.WRONG)


def test_gsm8k():
    """All gold solutions of the test set are right, and with another last number wrong."""
    path = real_data("gsm8k/test.jsonl")
    task, rng = MathTask("gsm8k", str(path), "gsm8k"), random.Random(0)
    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    golds = [problem.answer for problem in task.problems()]
    assert len(golds) == 1319
    pairs = list(zip(golds, solutions, strict=True))
    require(task, pairs, Verdict.RIGHT)
    wrong = [
        (gold, f"{solution} or {int(gold) + rng.choice([-1, 1, 10])}") for gold, solution in pairs
    ]
    require(task, wrong, Verdict.WRONG)


def test_champ():
    """Integers and yes or no, in several spellings; the opposite is wrong. Of all others, the
    answer as it stands is right."""
    task = MathTask("champ", str(real_data("champ/champ270.jsonl")), "champ")
    problems = list(task.problems())
    with GradingPool([task]) as pool:
        check_answers(task, problems, pool)
    short = [p.answer for p in problems if re.fullmatch(r"-?\d+|yes|no", p.answer, re.IGNORECASE)]
    assert len(short) > 100
    spellings = [(a, boxed(text)) for a in short for text in (rf"\text{{{a.lower()}}}", f"{a}.")]
    require(task, spellings, Verdict.RIGHT)
    opposite = {"yes": "No", "no": "Yes"}
    mistakes = [(a, boxed(opposite.get(a.lower()) or str(int(a) + 1))) for a in short]
    require(task, mistakes, Verdict.WRONG)
