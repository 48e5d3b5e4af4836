"""Means are sums and counts until the last moment; the files tell one story after a resume."""

import math
import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_eopd.comparison.parts import LEFT_OUT
from megatron_eopd.config import describe_options
from megatron_eopd.metrics.means import Means, divide
from megatron_eopd.metrics.rows import read_metrics
from megatron_eopd.metrics.sinks.choice import SINKS
from megatron_eopd.metrics.writer import MetricsWriter
from megatron_eopd.records import Bins, Histogram, Prompt, Rollout
from megatron_eopd.reporting.lines import evaluation_line
from megatron_eopd.reporting.run_report import before_after_table
from megatron_eopd.reporting.samples import escape_markdown, samples_markdown
from megatron_eopd.reporting.scalars import _repetition
from megatron_eopd.rollout.drawing import EngineUse
from megatron_eopd.rollout.states import Life
from megatron_eopd.rollout.vllm_engines import PARTS, engine_metrics

PAGE = Path(__file__).parents[1] / "docs/metrics.md"


def test_means_weigh_tokens_not_batches():
    """3 tokens of 1.0 and 1 token of 5.0 have the mean 2, not 3."""
    assert divide([{"x": (3.0, 3.0)}, {"x": (5.0, 1.0)}]) == {"x": 2.0}


def test_what_a_mask_leaves_out_does_not_matter():
    """Not even where it is infinite or no number."""
    means = Means()
    means.add("x", torch.tensor([1.0, torch.inf, torch.nan, 3.0]), torch.tensor([1, 0, 0, 1]) > 0)
    assert divide([{"x": tuple(means._sums["x"].tolist())}]) == {"x": 2.0}


def test_a_mean_over_nothing_is_no_mean_and_nan_stays_out_of_the_file(tmp_path):
    means = divide([{"gated": (0.0, 0.0), "all": (1.0, 2.0), "broken": (math.nan, 2.0)}])
    assert means.keys() == {"all", "broken"} and math.isnan(means["broken"])
    writer = MetricsWriter(tmp_path, resumed_at=0)
    writer.write(1, means)
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 1, "all": 0.5}]


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path, resumed_at=0)
    for iteration in range(1, 6):
        writer.write(iteration, {"x": iteration})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "x"')  # the crash
    writer = MetricsWriter(tmp_path, resumed_at=3)
    writer.write(4, {"x": 40})
    writer.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["iteration"], r["x"]) for r in rows] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path):
    """Its first evaluation is made again, and stands in the file once."""
    for _ in range(2):
        writer = MetricsWriter(tmp_path, resumed_at=None)
        writer.write(0, {"eval/t/pass@1": 0.5})
        writer.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_an_evaluation_stands_in_the_file_once(tmp_path):
    """Kept where the checkpoint came behind it, also before the first iteration; forgotten where
    the run stopped before it, and is to make it again."""
    for first, row in ((0, {"iteration": 0}), (2, {"iteration": 2})):
        writer = MetricsWriter(tmp_path, resumed_at=None)
        writer.write(first, {"loss/total": 0.25})
        writer.write(first, {"eval/t/pass@1": 0.5})
        writer.close()
        kept = [row | {"loss/total": 0.25}, row | {"eval/t/pass@1": 0.5}]
        for is_evaluated, rows in ((True, kept), (False, kept[:1])):
            MetricsWriter(tmp_path, first, is_evaluated=is_evaluated).close()
            assert read_metrics(tmp_path / "metrics.jsonl") == rows


@pytest.mark.parametrize("ids,expected", [((1, 2, 3), 0.0), ((1,) * 8, 0.8), (range(20), 0.0)])
def test_repetition_counts_repeated_4_grams(ids, expected):
    assert _repetition(tuple(ids)) == pytest.approx(expected)


def test_the_table_compares_the_first_and_the_last_evaluation():
    rows = [
        {"iteration": 0, "eval/t/pass@1": 0.1},
        {"iteration": 1, "loss/total": 3.0},
        {"iteration": 5, "eval/t/pass@1": 0.2},
        {"iteration": 9, "eval/t/pass@1": 0.4},
    ]
    table = before_after_table(rows)
    assert "before (iteration 0) | after (iteration 9)" in table
    assert "| t/pass@1 | 0.1000 | 0.4000 | +0.3000 |" in table
    assert "No evaluation" in before_after_table(rows[1:2])


def test_a_constant_is_drawn_as_a_constant(tmp_path):
    """A mean of many 0.8 is 0.8, and of sums of 0.1 as well."""
    means = Means()
    for count in (3, 7, 11):
        means.add("gate/threshold", torch.full((count,), 0.8, dtype=torch.float64))
    total, count = means._sums["gate/threshold"].tolist()
    writer = MetricsWriter(tmp_path, resumed_at=0)
    writer.write(1, {"gate/threshold": total / count, "x": (0.1 + 0.2) / 1})
    writer.close()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["gate/threshold"] == 0.8 and row["x"] == 0.3


def test_a_long_sum_of_float32_values_keeps_its_digits():
    values = torch.full((100_001,), 0.1)
    means = Means()
    means.add("x", values)
    total, count = means._sums["x"].tolist()
    assert total / count == pytest.approx(values[0].item(), rel=1e-12)


def test_tokens_are_counted_over_resumes(tmp_path):
    writer = MetricsWriter(tmp_path, resumed_at=0)
    for iteration in range(1, 4):
        writer.write(iteration, {"throughput/tokens_total": 100 * iteration})
    writer.write(3, {"eval/t/pass@1": 0.1})
    assert writer.tokens_total == 300
    writer.close()
    writer = MetricsWriter(tmp_path, resumed_at=2)
    assert writer.tokens_total == 200
    writer.close()


def test_the_accuracy_of_a_report_has_its_interval():
    rows = [{"iteration": i, "eval/t/avg@1": 0.1, "eval/t/accuracy_low": 0.05} for i in (0, 3)]
    rows = [row | {"eval/t/accuracy_high": 0.2} for row in rows]
    table = before_after_table(rows)
    assert "| t/avg@1 | 0.1000 (0.0500 to 0.2000) | 0.1000 (0.0500 to 0.2000) | +0.0000 |" in table
    assert "accuracy_low" not in table


def test_the_line_of_an_evaluation_has_what_one_watches():
    figures = {"pass@1": 0.21, "avg@4": 0.2, "accuracy_low": 0.1, "verdict/right": 0.2}
    assert evaluation_line("t", figures) == "t | pass@1 0.210 | avg@4 0.200"


def test_text_is_shown_as_it_was_written():
    """Rendered as Markdown, every character is back."""
    markdown = pytest.importorskip("markdown")
    for text in (
        "3*4*5 = 60",
        "# 18",
        "a_b_c",
        "x | y",
        "1. one",
        "- 2",
        "a\n===",
        "    4",
        "<<48/2=24>>24",
        "`x`",
    ):
        html = markdown.markdown(escape_markdown(text), extensions=["tables"])
        shown = unescape(re.sub(r"</?p>|<br ?/?>", "", html))
        assert shown == text, html
    assert markdown.markdown(escape_markdown("a\nb")).count("<br") == 1


def test_samples_say_what_a_reader_judges_them_by():
    class Tokenizer:
        def decode(self, ids):
            return "so 3*4 = 12"

    prompt = Prompt(0, "3*4 = ?", "12", (1,))
    rollouts = [
        Rollout(prompt, 0, (1, 2, 3), (0.0,) * 3, "stop", 0),
        Rollout(prompt, 0, (1, 2), (0.0,) * 2, "length", 0, source="reference"),
    ]
    ended, cut = samples_markdown(rollouts, Tokenizer(), [True, False]).split("---")
    assert "3&#42;4" in ended and "(3 tokens, ended; answer: 12; right)" in ended
    assert "2 tokens, cut; a reference answer, not the student's; answer: 12; wrong" in cut


def test_tensorboard_shows_the_counts_of_a_histogram(tmp_path):
    """One value in [1, 2) and three in [3, 4): with the empty bin between, and none around."""
    writer = MetricsWriter(tmp_path, resumed_at=None)
    bins = Bins("linear", 0.0, 8.0, 8)
    filled, empty = Histogram(bins, (0, 1, 0, 3, 0, 0, 0, 0)), Histogram(bins, (0,) * 8)
    writer.write(1, {}, {"filled": filled, "empty": empty})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["histograms"] == ["filled"]
    (event,) = events.Histograms("filled")
    shown = event.histogram_value
    assert (shown.min, shown.max, shown.num, shown.sum) == (1, 4, 4, 1.5 + 3 * 3.5)
    assert (shown.bucket_limit, shown.bucket) == ([1, 2, 3, 4], [0, 1, 0, 3])


def test_every_tracker_has_its_word():
    words = describe_options()
    (values,) = (option.values for option in words if option.name == "logging.trackers")
    assert set(values) == SINKS.keys()


def test_engines_are_measured_over_the_calls_of_an_iteration():
    """Two calls of 2 s and 6 s, in which engine 0 had requests for 4 s of the 8 and engine 1, which
    has died since, for none. docs/metrics.md has every name, and comparisons of runs none."""
    handles = [SimpleNamespace(number=n, life=Life(n, 3, restarts=n)) for n in range(2)]
    handles[1].life.failed_requests, handles[1].life.failed_probes = 2, 1
    fleet = SimpleNamespace(handles=handles, serving=handles[:1])
    calls = [
        SimpleNamespace(seconds=s, queue_wait_s=w, use={0: EngineUse(40, 2.0, r), 1: EngineUse()})
        for s, w, r in ((2.0, 0.5, 4.0), (6.0, 1.5, 20.0))
    ]
    found = engine_metrics(fleet, calls)
    assert found == {
        "engine/alive": 1,
        "engine/queue_wait_s": 1.0,
        "engine/0/tokens_per_s": 10.0,
        "engine/0/requests_in_flight": 3.0,
        "engine/0/idle_share": 0.5,
        "engine/0/restarts": 0,
        "engine/0/failed_requests": 0,
        "engine/0/failed_probes": 0,
        "engine/1/tokens_per_s": 0.0,
        "engine/1/requests_in_flight": 0.0,
        "engine/1/idle_share": 1.0,
        "engine/1/restarts": 1,
        "engine/1/failed_requests": 2,
        "engine/1/failed_probes": 1,
    }
    lasting = {n for n in found if n.endswith(("restarts", "failed_requests", "failed_probes"))}
    assert engine_metrics(fleet, []).keys() == {"engine/alive", *lasting}
    parts = {f"weight_sync/{part}_s" for part in (*PARTS, "load", "probe")}
    named = set(re.findall(r"`((?:engine|weight_sync)/[\w/]+)`", PAGE.read_text()))
    assert {re.sub(r"/\d/", "/N/", name) for name in found} | parts <= named
    assert all(LEFT_OUT.match(name) for name in (*found, *parts, "weight_sync/seconds"))
    assert not LEFT_OUT.match("weight_sync/probe_difference")
