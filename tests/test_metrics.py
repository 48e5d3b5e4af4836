"""Means are sums and counts until the last moment; the files tell one story after a resume."""

import math

import pytest

from megatron_eopd.metrics import MetricsWriter, divide, percentile, read_metrics
from megatron_eopd.report import _repetition, before_after_table


def test_means_weigh_tokens_not_batches():
    """3 tokens of 1.0 and 1 token of 5.0 have the mean 2, not 3."""
    assert divide([{"x": (3.0, 3.0)}, {"x": (5.0, 1.0)}]) == {"x": 2.0}


def test_a_mean_over_nothing_is_nan_and_stays_out_of_the_file(tmp_path):
    means = divide([{"gated": (0.0, 0.0), "all": (1.0, 2.0)}])
    assert math.isnan(means["gated"])
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


def test_percentiles_interpolate():
    assert percentile([0.0, 1.0, 2.0, 3.0], 0.5) == 1.5
    assert math.isnan(percentile([], 0.5))


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
