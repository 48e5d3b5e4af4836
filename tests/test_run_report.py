"""A run's report says what its files say, whatever is absent from them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_eopd import report
from megatron_eopd.config import config_of
from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.estimators import Outcome, highest, per_problem
from megatron_eopd.evaluation.intervals import intervals
from megatron_eopd.reporting import run_report
from megatron_eopd.reporting.document import to_markdown
from megatron_eopd.reporting.drawing import MOST_POINTS, thin, to_svg
from megatron_eopd.reporting.held_out_pictures import along_response, pass_at_k
from megatron_eopd.reporting.run_records import read_run, read_runs, unique_labels
from megatron_eopd.reporting.training_pictures import training_pictures

NUM_SAMPLES = 4
BEFORE, AFTER = (0, 0, 1, 1, 0, 1, 0, 0), (1, 1, 3, 3, 3, 4, 4, 4)
"""Right samples of each problem."""


def write_evaluation(
    run_dir: Path, iteration: int, rights: Sequence[int], task: str = "sums", **settings: object
) -> None:
    """As an evaluation leaves it: of each problem so many right samples, the first ones."""
    marks = [[n < right for n in range(NUM_SAMPLES)] for right in rights]
    outcomes = [
        Outcome(
            tuple("right" if mark else "wrong" for mark in own),
            tuple("yes" if mark else f"no {n}" for n, mark in enumerate(own)),
            (None,) * NUM_SAMPLES,
            (7,) * NUM_SAMPLES,
            (False,) * NUM_SAMPLES,
            None,
        )
        for own in marks
    ]
    values = per_problem(outcomes, [1, 2, 4])
    limits = {name: highest(name, 24) for name in values}
    content = {
        "format": 1,
        "task": task,
        "model": {"iteration": iteration},
        "settings": {
            **{"num_samples": NUM_SAMPLES, "temperature": 1, "top_p": 1, "max_response_length": 24},
            **{"seed": 1, "chat_template": "", "tokenizer": "", "prompts": "", "graders": {}},
            "num_problems": len(rights),
            **settings,
        },
        "figures": {name: float(np.nanmean(each)) for name, each in values.items()},
        "intervals": intervals(values, limits, seed=1, num_draws=200),
        "curves": {
            "teacher_entropy": [0.9, 0.5, None, 0.25],
            "student_entropy": [1.5, 0.75, None, 0.5],
            "teacher_above_threshold": [0.5, 0.25, None, 0.0],
        },
        "problems": [{"id": str(n), **outcome._asdict()} for n, outcome in enumerate(outcomes)],
    }
    directory = run_dir / f"evaluations/{iteration:06d}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{task}.json").write_text(json.dumps(content))


def training_row(iteration: int) -> dict[str, float]:
    return {
        "iteration": iteration,
        "loss/total": 1 / iteration,
        "loss/reverse_kl": 2 / iteration,
        "loss/reverse_kl_gated": 3 / iteration,
        "entropy/teacher_mean": 0.25,
        "entropy/student_mean": 0.5,
        "gate/fraction": 0.125,
        "optim/grad_norm": 1.5,
        "time/rollout": 1.0,
        "time/train": 2.0,
        "time/total": 3.5,
        "throughput/tokens_per_s": 100.0,
        "throughput/tokens_total": 1000 * iteration,
    }


def write_run(
    run_dir: Path, *, iterations: int = 3, evaluates: bool = True, **options: str
) -> Path:
    """A whole run folder with known numbers; `options`: of its objective."""
    run_dir.mkdir(parents=True)
    tree = {
        "run_dir": str(run_dir),
        "student": {"hf_path": "small"},
        "teacher": {"hf_path": "large"},
        "objective": options,
    }
    (run_dir / "config.json").write_text(config_of(tree).model_dump_json())
    (run_dir / "commit.txt").write_text("0123456789abcdef\n")
    rows = [training_row(n) for n in range(1, iterations + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluates:
        write_evaluation(run_dir, 0, BEFORE)
        write_evaluation(run_dir, iterations, AFTER)
    return run_dir


def written(*arguments: object) -> int:
    return report.main([str(argument) for argument in arguments])


def lines_of(axes) -> dict[str, list[float]]:
    """Label → y."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def text_of(*run_dirs: Path) -> str:
    """Markdown without pictures."""
    runs = read_runs(run_dirs)
    tests = run_report.paired_tests(runs)
    document = run_report.document_of(runs, tests, run_report.NO_PICTURES)
    return to_markdown(document, Path("report"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """A run of which the command has made a report."""
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "run", entropy_threshold=0.5)
    assert written(run_dir) == 0
    return run_dir


# --- text ---------------------------------------------------------------------------------------


def test_a_report_has_the_runs_numbers(reported):
    """Right samples rise from 3 to 23 of 32; 3,000 tokens, 3 × 3.5 s, and what is no default."""
    text = (reported / "report.md").read_text()
    assert text.startswith("# eopd: large → small\n")
    assert "| held-out figure | before (iteration 0) | after (iteration 3) | change |" in text
    assert "| sums/pass@1 | 0.0938 | 0.7188 | +0.6250 |" in text
    assert re.search(r"\| sums/avg@4 \| 0\.0938 \(0\.\d{4} to 0\.\d{4}\) \| 0\.7188 \(0\.", text)
    for row in (
        "| response tokens trained on | 3,000 |",
        "| time in iterations | 10 s |",
        "| iterations | 3 of 200 |",
        "| gate's threshold τ | 0.5 nats |",
        "| commit | 0123456789ab |",
        "| objective.entropy_threshold | 0.5 | 0.8 |",
    ):
        assert row in text
    assert "objective.name |" not in text  # which is the default


def test_before_and_after_are_tested_in_pairs(reported):
    """All eight problems are better: of 2^8 exchanges two make as much of a difference."""
    text = (reported / "report.md").read_text()
    (row,) = re.findall(r"\| avg@4 \| 0\.094 \| 0\.719 \| \+0\.625 \| .* \|", text)
    assert float(row.split("|")[-2]) == pytest.approx(2 / 2**8, abs=0.004)
    assert "At the 5 % level higher: " in text and "the same 8 problems" in text


def test_pictures_are_in_the_page_and_beside_the_text(reported):
    linked = re.findall(r"\]\((report/\w+\.svg)\)", (reported / "report.md").read_text())
    assert {"report/loss.svg", "report/speed.svg", "report/pass_at_k_sums.svg"} <= set(linked)
    page = (reported / "report.html").read_text()
    assert page.count("<svg ") == len(linked) == len(list((reported / "report").iterdir()))
    for name in linked:
        ElementTree.parse(reported / name)
    assert not re.search(r"<script|<image|(src|href)=\"(?!#)", page)


def test_the_same_numbers_give_the_same_bytes(reported):
    again = to_svg(next(training_pictures([read_run(reported, "run")])).figure)
    assert again == (reported / "report/loss.svg").read_text()


def test_names_are_shown_as_text(tmp_path, capsys):
    """Of runs, tasks, titles and options: no element, formula, or table cell comes of them."""
    bad = "<img src=x onerror=alert(1)>|$\\frac{$"
    names = ("_a $x^$", "<b>&amp;\x07")
    runs = [write_run(tmp_path / name, evaluates=False) for name in names]
    write_evaluation(runs[0], 3, AFTER, task=bad.replace("/", ""))
    for run_dir in runs:
        (run_dir / "log").mkdir()
        (run_dir / "log/rank0.txt").write_text(f"2026-01-01 00:00:00 WARNING: {bad}\nand more\n")
    assert written(*runs, "--output", tmp_path / "out", "--title", bad) == 0
    told = capsys.readouterr().out.split()
    assert told == [f"{tmp_path}/out/report.md", f"{tmp_path}/out/report.html"]
    page = (tmp_path / "out/report.html").read_text()
    text = (tmp_path / "out/report.md").read_text()
    assert "<img" not in page and "<b>" not in page and "\x07" not in page + text
    assert "&lt;img src=x onerror=alert(1)&gt;|$\\frac{$" in page and "and more" in page
    assert "&lt;b&gt;&amp;amp;" in page and "_a $x^$" in page
    without_code = re.sub(r"^    .*", "", text, flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)<(img|b)", without_code)
    for path in (tmp_path / "out/report").iterdir():
        ElementTree.parse(path)


def test_warnings_of_the_log_are_told_once(tmp_path):
    run_dir = write_run(tmp_path / "run")
    (run_dir / "log").mkdir()
    stamp = "2026-01-01 00:00:00 "
    lines = ["WARNING: engine 0 died: x\nits requests go on", "step 1/3 | WARNING in a line"]
    (run_dir / "log/rank0.txt").write_text("".join(f"{stamp}{x}\n" for x in [*lines, lines[0]]))
    text = text_of(run_dir)
    assert text.count("- WARNING: engine 0 died: x its requests go on") == 1
    assert "in a line" not in text


# --- pictures -----------------------------------------------------------------------------------


def test_curves_are_the_metrics(tmp_path):
    """Loss by gate, entropies, and stages upon each other with the rest of the iteration."""
    run = read_run(write_run(tmp_path / "run"), "run")
    drawn = {each.name: each.figure for each in training_pictures([run])}
    objective, reverse = drawn["loss"].axes
    assert list(lines_of(objective).values()) == [[1, 1 / 2, 1 / 3]]
    assert lines_of(reverse) == {
        "all tokens": [2, 1, 2 / 3],
        "gate open": [3, 3 / 2, 1],
    }
    entropy, gate = drawn["entropy"].axes
    assert lines_of(entropy) == {"teacher": [0.25] * 3, "student": [0.5] * 3}
    assert list(lines_of(gate).values()) == [[0.125] * 3]
    _, stack = drawn["speed"].axes
    tops = {each.get_label(): each.get_datalim(stack.transData).y1 for each in stack.collections}
    assert tops == pytest.approx({"rollout": 1.0, "train": 3.0, "rest": 3.5})


def test_several_runs_are_drawn_in_one_panel(tmp_path):
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", iterations=2)])
    drawn = {each.name: each.figure for each in training_pictures(runs)}
    found = lines_of(drawn["loss"].axes[1])
    assert found["a, gate open"] == [3, 3 / 2, 1] and found["b, all tokens"] == [2, 1]
    (legend,) = drawn["loss"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_pass_at_k_has_both_ends_and_their_intervals(tmp_path):
    """pass@4 is the share of problems with a right sample: 3 of 8, then all."""
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")])
    first, _, both = pass_at_k("sums", runs).axes
    ends = [list(bars.lines[0].get_ydata()) for bars in first.containers]
    assert [values[-1] for values in ends] == [3 / 8, 1]
    assert [values[0] for values in ends] == [3 / 32, 23 / 32]
    (_, low), (_, high) = first.containers[1].lines[2][0].get_segments()[-1]
    report_ = runs[0].evaluations["sums"][-1].report
    assert (low, high) == pytest.approx(report_.intervals["pass@4"])
    assert [bars.get_label() for bars in both.containers] == ["a", "b"]


def test_a_run_has_one_colour_in_all_pictures(tmp_path):
    """Also where the run before it has no evaluation of the task."""
    runs = read_runs([write_run(tmp_path / "a", evaluates=False), write_run(tmp_path / "b")])
    loss = next(training_pictures(runs)).figure.axes[0]
    (colour,) = [line.get_color() for line in loss.lines if line.get_label().startswith("b")]
    _, both = pass_at_k("sums", runs).axes
    assert [bars.lines[0].get_color() for bars in both.containers] == [colour]


def test_entropy_along_the_response_has_a_gap_where_no_token_was(tmp_path):
    run = read_run(write_run(tmp_path / "run"), "run")
    (axes,) = along_response("sums", [run], "entropy", "nats").axes
    found = lines_of(axes)
    teacher = found["teacher, iteration 0"]
    assert teacher[:2] == [0.9, 0.5] and np.isnan(teacher[2]) and teacher[3] == 0.25
    assert found["student, iteration 3"][0] == 1.5
    assert [0.8, 0.8] in found.values()  # the gate's threshold
    (axes,) = along_response("sums", [run], "above_threshold", "share").axes
    assert lines_of(axes)["teacher, iteration 3"][:2] == [0.5, 0.25]


def test_a_long_curve_is_thinned_and_keeps_its_spike():
    y_N = np.zeros(100_001)
    y_N[70_000] = 9.0
    drawn = thin(np.arange(len(y_N), dtype=float), y_N)
    assert len(drawn.x_M) <= MOST_POINTS
    assert drawn.high_M.max() == 9.0 and drawn.low_M.max() == 0.0
    assert drawn.mean_M.max() == pytest.approx(9.0 / np.ceil(len(y_N) / MOST_POINTS))
    short = thin(np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    assert list(short.mean_M) == [3.0, 4.0]


# --- several runs -------------------------------------------------------------------------------


def test_runs_stand_side_by_side(tmp_path):
    """With what differs between them, and a paired test of the last evaluations."""
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", name="opd")
    write_evaluation(b, 3, BEFORE)
    text = text_of(a, b)
    assert text.startswith("# a against b\n")
    assert "| sums/pass@1 | 0.0938 → 0.7188 | 0.0938 → 0.0938 |" in text
    assert "| objective.name | eopd | opd |" in text and "| run_dir |" not in text
    assert "| avg@4 | 0.719 | 0.094 | -0.625 |" in text


def test_what_was_not_sampled_alike_is_not_tested(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    write_evaluation(runs[1], 3, AFTER, temperature=0.5)
    text = text_of(*runs)
    assert "No paired test of a, iteration 3 (A) against b, iteration 3 (B)." in text
    assert "temperature: A 1.0, B 0.5" in text


def test_runs_without_a_task_in_common_are_told(tmp_path):
    runs = [write_run(tmp_path / name, evaluates=name != "none") for name in ("a", "b", "none")]
    (runs[1] / "evaluations").rename(runs[1] / "moved")
    write_evaluation(runs[1], 3, AFTER, task="other")
    text = text_of(*runs)
    assert "No task has a report in all of these runs: a has sums; b has other." in text
    assert "Without an evaluation: none." in text
    assert "| other/pass@1 | – → – | 0.7188 → 0.7188 |" in text


@pytest.mark.parametrize(
    "paths,labels",
    [
        (("x/a", "x/b"), ["a", "b"]),
        (("x/a", "y/a", "y/b"), ["x/a", "y/a", "b"]),
        (("p/x/a", "q/x/a"), ["p/x/a", "q/x/a"]),
        (("x/\x01", "x/\x02"), ["x/\ufffd (1)", "x/\ufffd (2)"]),
    ],
)
def test_every_run_has_a_label_of_its_own(paths, labels):
    assert unique_labels([Path(path) for path in paths]) == labels


# --- what is absent, damaged or under way -------------------------------------------------------


def cut_last_line(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])


def one_iteration(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(json.dumps(training_row(1)) + "\n")


DAMAGES = {
    "cut": (cut_last_line, "| 2 of 200 |"),
    "one": (one_iteration, "| 1 of 200 |"),
    "no_line": (lambda run: (run / "metrics.jsonl").write_text(""), "has no whole line yet"),
    "no_metrics": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl cannot be read"),
    "no_config": (lambda run: (run / "config.json").unlink(), "config.json cannot be read"),
    "half_config": (lambda run: (run / "config.json").write_text("{"), "config.json cannot be"),
    "half_report": (
        lambda run: (run / "evaluations/000003/sums.json").write_text('{"format": 1,'),
        "000003/sums.json: not the whole report of an evaluation",
    ),
    "one_evaluation": (
        lambda run: (run / "evaluations/000003").rename(run / "evaluations/superseded-000003-1"),
        "There is one evaluation so far",
    ),
    "no_evaluation": (
        lambda run: (run / "evaluations").rename(run / "moved"),
        "No evaluation was configured",
    ),
}
"""Name → what happens to a run, and what its report says then."""


@pytest.mark.parametrize("name", DAMAGES)
def test_a_report_says_what_is_missing(name, tmp_path):
    damage, said = DAMAGES[name]
    run_dir = write_run(tmp_path / "run")
    damage(run_dir)
    assert said in text_of(run_dir)


def test_what_is_there_is_drawn(tmp_path):
    """Of damaged runs in one report; and of a run that has one iteration and nothing else."""
    for names in (("one", "one_evaluation"), ("no_metrics",), ("half_config", "no_evaluation")):
        run_dir = write_run(tmp_path / names[0])
        for name in names:
            DAMAGES[name][0](run_dir)
    runs = read_runs(sorted(tmp_path.iterdir()))
    drawn = run_report.draw(runs)
    shown = re.findall(r">(\w+)</text>", drawn.training[0].svg)
    assert {"one", "no_metrics", "half_config"} <= set(shown)  # in the legend
    assert len(drawn.by_task["sums"]) == 4
    alone = write_run(tmp_path / "alone", iterations=1, evaluates=False)
    (alone / "config.json").unlink()
    drawn = run_report.draw(read_runs([alone]))
    assert [picture.name for picture in drawn.training] == ["loss", "entropy", "optimizer", "speed"]
    assert not drawn.by_task


def test_what_is_no_run_is_one_message(tmp_path, capsys):
    run_dir = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for arguments, said in (
        (["empty"], "empty: has neither config.json nor metrics.jsonl, so it is not a run's."),
        (["absent"], "absent: is no folder, so it is not a run's."),
        (["run", "run/../run"], "is named twice."),
        (["run", "--output", "file"], "file: the report cannot be written"),
    ):
        paths = [x if x.startswith("--") else tmp_path / x for x in arguments]
        assert written(*paths) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Name each run once"):
        read_runs([run_dir, run_dir])


# --- at the end of a run ------------------------------------------------------------------------


def ended(run_dir: Path) -> str:
    tree = json.loads((run_dir / "config.json").read_text())
    return run_report.finish_report(config_of(tree), run_dir / "hf", minutes=2.5)


def test_a_run_ends_with_its_table_and_a_report(tmp_path):
    run_dir = write_run(tmp_path / "run")
    told = ended(run_dir)
    assert "| sums/pass@1 | 0.0938 | 0.7188 | +0.6250 |" in told
    assert f"Hugging Face export: {run_dir}/hf" in told and f"{run_dir}/report.html" in told
    assert "WARNING" not in told
    text = (run_dir / "report.md").read_text()
    assert "](report/loss.svg)" in text and "The command took 2 min 30 s" in text


def test_pictures_that_fail_leave_the_text(tmp_path, monkeypatch):
    """The run has ended well: it is a warning."""

    def fail(runs: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(run_report, "draw", fail)
    run_dir = write_run(tmp_path / "run")
    told = ended(run_dir)
    assert "so report.md has none: RuntimeError('no fonts')" in told
    text = (run_dir / "report.md").read_text()
    assert "| sums/pass@1 | 0.0938 |" in text and ".svg" not in text
    assert not (run_dir / "report.html").exists()


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path):
    run_dir = write_run(tmp_path / "run")
    (run_dir / "report.md").mkdir()
    told = ended(run_dir)
    assert "WARNING: the report could not be written: IsADirectoryError" in told
    assert "| sums/pass@1 | 0.0938 |" in told and f"{run_dir}/hf" in told
