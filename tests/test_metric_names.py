"""The names of metrics exist once: what runs write, docs/metrics.md and the dashboards agree."""

import ast
import re
from pathlib import Path

import pytest

from megatron_eopd.config import describe_options
from megatron_eopd.evaluation.report_file import names_of_figures
from megatron_eopd.metrics import guide
from megatron_eopd.metrics.dashboards import dashboards, figures_of_a_run
from megatron_eopd.metrics.names import GROUPS, all_metrics, find, page, table

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/metrics.md").read_text()
FOLDERS = {metric.name.partition("/")[0] for metric in all_metrics()}
NOT_WRITTEN = {"mismatch/logprob_abs"}
"""Counted for its percentile alone."""
NO_METRICS = {"weight_sync/manifest"}
"""A key of a store."""


def written_in_code() -> set[str]:
    """Literals in the package that look like a metric."""
    found = set()
    for path in (ROOT / "megatron_eopd").rglob("*.py"):
        if path.parts[-2] == "metrics":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    pattern = re.compile(rf"({'|'.join(FOLDERS)})/\w+(/\w+)*")
    return {text for text in found if pattern.fullmatch(text)}


def samples() -> set[str]:
    """A name as runs write it for each that is registered."""
    return {
        re.sub(
            r"(?<=[@^])k$", "4", re.sub("<task>|<teacher>", "math", m.name).replace("/N/", "/0/")
        )
        for m in all_metrics()
    }


def test_every_name_in_the_code_is_registered():
    names = written_in_code()
    assert {"loss/total", "optim/lr", "memory/cuda_peak_gib", "end/teacher_logprob"} <= names
    assert {name for name in names if find(name) is None} <= NOT_WRITTEN | NO_METRICS


def test_every_figure_of_an_evaluation_is_registered():
    figures = {f"eval/countdown/{figure}" for figure in names_of_figures(64)}
    assert len(figures) > 30 and not {name for name in figures if find(name) is None}


def test_a_name_stands_for_itself_alone():
    """Each is found by what runs write for it, and nothing near it is."""
    names = [metric.name for metric in all_metrics()]
    assert len(set(names)) == len(names) == len(samples())
    assert {find(name).name for name in samples()} == set(names)
    near = ("loss", "loss/total/x", "eval/a/b/pass@1", "eval/a/pass@k", "engine/x/restarts")
    assert not [name for name in near if find(name) is not None]


@pytest.mark.parametrize("group", GROUPS)
def test_the_page_has_the_registered_table(group):
    section = PAGE.split(f"\n## {group}\n")[1].split("\n## ")[0]
    assert section.count("| name |") == 1
    assert table(group) in section


def test_the_page_has_the_guide_that_the_trackers_show():
    text = (ROOT / "docs/monitoring.md").read_text()
    assert guide.table() in text and guide.SOURCES in text


def test_texts_name_what_there_is():
    """Metrics, or options, wherever something in backticks looks like one."""
    options = {option.name for option in describe_options()}
    sections = {name.partition(".")[0] for name in options}
    text = page() + guide.page()
    quoted = set(re.findall(r"`([a-z_]+[./][\w./@^]+)`", text))
    assert len(quoted) > 60
    for name in quoted - {metric.name for metric in all_metrics()}:
        assert name in options or name.split(".")[0] not in sections, name
        assert "/" not in name or find(name) is not None, name


def test_units_and_texts_fit_a_table():
    for metric in all_metrics():
        assert metric.text and not set("|\n") & set(metric.text + metric.unit), metric
    assert {sign.metric for sign in guide.SIGNS} <= {metric.name for metric in all_metrics()}


def test_every_curve_of_a_dashboard_exists():
    """As its plugin looks them up, with re.match; and tasks have charts only where they are."""
    names = samples()
    layout = dashboards(names)
    tags = [tag for charts in layout.values() for _, curves in charts.values() for tag in curves]
    for tag in tags:
        assert any(re.match(tag, name) for name in names), tag
    of_some = ("Evaluation", "Several teachers")
    assert list(dashboards([])) == [name for name in layout if name not in of_some]
    bare = dashboards(["loss/total", "memory/host_peak_gib"])
    assert "by source" in layout["Loss"] and "by source" not in bare["Loss"]
    assert list(layout["Memory"]) == ["device", "host"] and list(bare["Memory"]) == ["host"]
    assert layout["Evaluation"]["math: accuracy, 95 %"] == [
        "Margin",
        ["eval/math/avg@4", "eval/math/accuracy_low", "eval/math/accuracy_high"],
    ]


def test_runs_are_compared_by_loss_and_final_figures():
    figures = figures_of_a_run(["eval/t/pass@1", "eval/t/verdict/right", "loss/total", "optim/lr"])
    assert figures == ["eval/t/pass@1", "loss/total"]
