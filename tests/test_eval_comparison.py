"""Reports of evaluations against each other: what is said, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.comparison import compare
from megatron_eopd.evaluation.estimators import figures, highest, per_problem
from megatron_eopd.evaluation.intervals import intervals
from megatron_eopd.evaluation.report_text import number, report_markdown
from megatron_eopd.evaluation.reports import Report, read_report

KS = (1, 4)


def report(
    rate: float, task: str = "digits", num_problems: int = 60, **settings: Any
) -> dict[str, Any]:
    """Of a model that is right at this rate, 4 samples of each problem."""
    generator = np.random.default_rng(1)
    problems = [
        {
            "id": f"test line {n}",
            "verdicts": ["right" if mark else "wrong" for mark in marks],
            "canonical": ["7" if mark else "5" for mark in marks],
            "second": marks.tolist(),
            "lengths": [100, 110, 120, 130],
            "cut": [False] * 4,
            "num_right": None,
        }
        for n, marks in enumerate(generator.uniform(size=(num_problems, 4)) < rate)
    ]
    told = {
        "num_samples": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_response_length": 512,
        "seed": 24301,
        "chat_template": "c" * 64,
        "tokenizer": "a" * 64,
        "prompts": "d" * 64,
        "graders": {"math-verify": "0.9.0"},
        "num_problems": num_problems,
    }
    made = {
        "format": 1,
        "task": task,
        "model": {"path": f"model-{rate}"},
        "settings": told | settings,
        "figures": {},
        "intervals": {},
        "problems": problems,
    }
    outcomes = Report.model_validate(made).outcomes
    values = per_problem(outcomes, KS)
    tops = {name: highest(name, 512) for name in values}
    made["figures"] = figures(outcomes, KS) | {"reverse_kl": 0.123}
    made["intervals"] = intervals(values, tops, seed=1, num_draws=500)
    return made


def write(directory: Path, *reports: dict[str, Any]) -> Path:
    directory.mkdir()
    for made in reports:
        (directory / f"{made['task']}.json").write_text(json.dumps(made))
    return directory


def row(text: str, figure: str) -> list[str]:
    line = re.search(rf"^\| {re.escape(figure)} \|(.*)\|$", text, re.MULTILINE)
    assert line, f"no row {figure} in\n{text}"
    return [cell.strip() for cell in line[1].split("|")]


def test_a_better_model_is_said_to_be_better(tmp_path):
    """With its difference, the interval around it, p, and what could not have been seen."""
    a, b = write(tmp_path / "a", report(0.3)), write(tmp_path / "b", report(0.6))
    text = compare(a, b)
    assert re.search(r"\*\*B is better on .*avg@4.*\.\*\*", text)
    mean_a, mean_b, difference, interval, p, smallest = row(text, "avg@4")
    assert float(difference) == pytest.approx(float(mean_b) - float(mean_a), abs=2e-3)
    low, high = json.loads(interval.replace("+", ""))
    assert 0 < low < float(difference) < high
    assert p == "< 0.001" and 0.05 < float(smallest) < 0.2
    assert f"under {smallest} in avg@4" in text
    assert {"pass@4", "pass^4", "maj@4", "distinct_correct@4", "length_mean"} <= set(
        re.findall(r"^\| (\S+) \|", text, re.MULTILINE)
    )


def test_a_worse_model_is_said_to_be_worse_and_neutral_figures_neither(tmp_path):
    """Longer responses are no better and no worse."""
    longer = report(0.3)
    for problem in longer["problems"]:
        problem["lengths"] = [200, 210, 220, 230]
    text = compare(write(tmp_path / "a", report(0.6)), write(tmp_path / "b", longer))
    assert re.search(r"\*\*B is worse on .*avg@4.*; higher in length_mean\.\*\*", text)


def test_a_model_against_itself_shows_nothing(tmp_path):
    """And the text says how large a difference would have to be."""
    path = write(tmp_path / "a", report(0.5))
    text = compare(path, path)
    assert "**No difference can be seen.** On 60 problems, differences under" in text
    assert row(text, "avg@4")[2:5:2] == ["0.000", "1.000"]


def test_five_problems_are_said_to_be_too_few(tmp_path):
    small = {"num_problems": 5}
    a, b = report(0.01, **small), report(0.99, **small)
    text = compare(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert "5 problems are too few to show any." in text
    assert row(text, "avg@4")[-1] == "none"


def test_tasks_of_one_side_are_named_and_files_can_be_compared(tmp_path):
    """What both have is compared; a task that only one has is said."""
    a = write(tmp_path / "a", report(0.5), report(0.5, "words"))
    b = write(tmp_path / "b", report(0.5), report(0.5, "sums"))
    text = compare(a, b)
    assert "Only A has words." in text and "Only B has sums." in text
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["digits"]
    assert compare(a / "digits.json", b / "digits.json").count("## ") == 1
    with pytest.raises(ConfigError, match=r"no task in common: .* has words, .* has sums"):
        compare(a / "words.json", b / "sums.json")


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("temperature", 0.6, "A 1.0, B 0.6"),
        ("top_p", 0.9, "A 1.0, B 0.9"),
        ("max_response_length", 256, "A 512, B 256"),
        ("prompts", "e" * 64, "A dddddddddddd, B eeeeeeeeeeee"),
        ("chat_template", "e" * 64, "A cccccccccccc, B eeeeeeeeeeee"),
        ("graders", {"math-verify": "0.8.0"}, "A math-verify 0.9.0, B math-verify 0.8.0"),
        ("a_new_setting", 3, "A null, B 3"),
    ],
)
def test_what_was_not_sampled_alike_is_refused(tmp_path, name, value, shown):
    """Whatever the setting, also one that is not known here; with both values."""
    a, b = write(tmp_path / "a", report(0.5)), write(tmp_path / "b", report(0.5, **{name: value}))
    with pytest.raises(ConfigError, match=re.escape(f"{name}: {shown}")):
        compare(a, b)


def test_every_differing_setting_is_named(tmp_path):
    a = write(tmp_path / "a", report(0.5))
    b = write(tmp_path / "b", report(0.5, top_p=0.9, temperature=0.6))
    with pytest.raises(ConfigError, match=r"temperature: A 1\.0, B 0\.6; top_p: A 1\.0, B 0\.9"):
        compare(a, b)


def test_other_seeds_tokenizers_and_engines_are_told(tmp_path):
    """They do not keep figures from being compared."""
    other = {"seed": 1, "tokenizer": "b" * 64, "engine": "vllm"}
    same = write(tmp_path / "a", report(0.5, engine="in_process"))
    text = compare(same, write(tmp_path / "b", report(0.5, **other)))
    assert "seed is 24301 in A and 1 in B" in text
    assert "tokenizer is aaaaaaaaaaaa in A and bbbbbbbbbbbb in B" in text
    assert "engine is in_process in A and vllm in B" in text
    assert "drawn with the same seed" in compare(same, same)


def test_other_problems_are_refused(tmp_path):
    """Pairs are made by position, so the names at each must agree."""
    other = report(0.5)
    other["problems"][2]["id"] = "elsewhere"
    with pytest.raises(ConfigError, match="problem 3 is test line 2 in A and elsewhere in B"):
        compare(write(tmp_path / "a", report(0.5)), write(tmp_path / "b", other))


def without(made: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name != key}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (json.dumps(report(0.5))[:1000], "JSON"),
        ("", "JSON"),
        (json.dumps(without(report(0.5), "settings")), "settings: Field required"),
        (json.dumps(report(0.5) | {"format": 2}), "format: Input should be 1"),
        (json.dumps(report(0.5) | {"problems": []}), "0 problems"),
        (json.dumps(report(0.5) | {"figures": {"avg@4": float("nan")}}), "figures.avg@4"),
    ],
)
def test_damaged_reports_are_refused_by_name(tmp_path, content, told):
    """Cut short, of another format, or with less than its settings say."""
    path = tmp_path / "digits.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"digits\.json.*{told}"):
        compare(path, path)


def test_missing_reports_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.*No such file"):
        compare(tmp_path / "absent", tmp_path)
    with pytest.raises(ConfigError, match=r"holds no TASK\.json"):
        compare(tmp_path, tmp_path)
    twice = write(tmp_path / "twice", report(0.5))
    (twice / "copy.json").write_text(json.dumps(report(0.5)))
    with pytest.raises(ConfigError, match="two reports of digits"):
        compare(twice, twice)


def test_report_as_text(tmp_path):
    """Figures with intervals where there are some, verdicts with counts, and every setting."""
    path = write(tmp_path / "a", report(0.5)) / "digits.json"
    found = read_report(path)
    text = report_markdown(found)
    value, ends = row(text, "avg@4")
    low, high = json.loads(ends)
    assert low < float(value) < high
    assert row(text, "reverse_kl") == ["0.123", ""]
    right = sum(p.verdicts.count("right") for p in found.problems)
    assert row(text, "right")[:2] == [str(right), number(right / 240)]
    assert row(text, "timed out")[0] == "0"
    assert row(text, "temperature") == ["1.0"]
    assert row(text, "graders") == ["math-verify 0.9.0"]
    assert "verdict/right" not in text


def test_numbers():
    """Readable, and without the sign of a zero."""
    shown = [number(x, sign=True) for x in (0.5234, -0.0001, 318.44, -12.0)]
    assert shown == ["+0.523", "0.000", "+318.4", "-12.0"]
