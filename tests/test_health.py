"""Warnings: when they come, that they come once, and that a healthy run has none."""

import re
from math import nan
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_eopd import warning_rules as rules
from megatron_eopd.config import Config
from megatron_eopd.health import HealthCheck
from megatron_eopd.metrics.rows import read_metrics
from megatron_eopd.rollout.engine import SyncReport
from megatron_eopd.warning_rules import RULES
from megatron_eopd.weight_sync.verify import Probe

HEALTHY = {
    "mismatch/mult_prob_error": 1.0,
    "gate/fraction": 0.3,
    "rollout/length_mean": 100.0,
    "rollout/truncated_fraction": 0.1,
    "rollout/repetition": 0.05,
    "entropy/student_mean": 0.8,
    "entropy/teacher_mean": 0.9,
    "entropy/teacher_p90": 1.4,
    "end/teacher_logprob": -0.5,
    "end/student_logprob": -0.1,
}
SYNC = SyncReport(1, 0.0, 0)


@pytest.fixture
def health():
    """(check, what it said)."""
    told: list[str] = []
    config = Config.model_validate(
        {"run_dir": "r", "student": {"hf_path": "s"}, "teacher": {"hf_path": "t"}}
        | {"model": {"dtype": "bfloat16"}}
    )
    return HealthCheck(config, SimpleNamespace(line=told.append)), told


def test_a_healthy_run_hears_nothing(health):
    check, told = health
    for _ in range(3):
        check.look(HEALTHY, SYNC)
    assert told == []


@pytest.mark.parametrize(
    "values,said",
    [
        ({"gate/fraction": 0.99}, "the gate is open for 99% .*reference_fraction=1"),
        ({"rollout/truncated_fraction": 1.0}, "100% .* cut at rollout.max_response_length=4096"),
        ({"gate/fraction": 0.001}, "open for 0.10% .* one of reverse KL.* above 1.4"),
        ({"rollout/repetition": 0.7}, "repeats itself"),
        (
            {"rollout/length_mean": 260.0, "rollout/truncated_fraction": 0.4},
            "from 100 to 260 tokens, and 40% are cut, from 10%.*view r`",
        ),
        ({"end/teacher_logprob": -21.0}, "-21 nats in the mean, the student -0.1.*eos_token_map"),
        ({"entropy/student_mean": 0.02}, "entropy fell to 0.020 nats, from 0.800"),
        ({"mismatch/mult_prob_error": 1.9}, "engine and trainer disagree .* is 0.9"),
        ({"mismatch/mult_prob_error": nan}, "engine and trainer disagree .* is nan"),
        ({"gate/fraction": nan}, "the gate is open for nan% "),
        ({"entropy/student_mean": nan}, "entropy fell to nan"),
    ],
)
def test_each_sign_is_told_once_with_advice(health, values, said):
    check, told = health
    check.look(HEALTHY, SYNC)
    for _ in range(2):
        check.look(HEALTHY | values, SYNC)
    assert len(told) == 1
    assert re.search(said, told[0], re.DOTALL), told[0]


def test_the_quick_start_hears_nothing(health):
    """A real run: every tenth iteration of 260, what the rules look at."""
    check, told = health
    rows = read_metrics(Path(__file__).parent / "golden/quickstart_watched.jsonl")
    assert [row["iteration"] for row in rows] == [1, *range(10, 261, 10)]
    looked_at = HEALTHY.keys() - {"iteration"}
    for row in rows:
        assert looked_at <= row.keys()
        check.look(row, SYNC)
    assert told == []


def test_the_page_has_every_rule_and_its_bounds():
    page = (Path(__file__).parents[1] / "docs/monitoring.md").read_text()
    for rule in RULES:
        assert f"| `{rule.__name__}` |" in page, rule
    for name, bounds in {
        "gate_open": [rules.OPEN_GATE],
        "gate_closed": [rules.CLOSED_GATE],
        "truncated": [rules.TRUNCATED],
        "runaway_length": [rules.RUNAWAY_LENGTH, rules.RUNAWAY_TRUNCATED],
        "repetition": [rules.REPETITION],
        "entropy_collapse": [rules.COLLAPSED],
        "end_tokens": [rules.END_LOGPROB],
    }.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        for bound in bounds:
            assert f" {bound} " in f"{row} ".replace(",", " "), (name, bound)


def test_longer_answers_alone_are_no_sign(health):
    """Nor is a budget that cuts as many as before."""
    check, told = health
    check.look(HEALTHY, SYNC)
    check.look(HEALTHY | {"rollout/length_mean": 900.0}, SYNC)
    check.look(HEALTHY | {"rollout/truncated_fraction": 0.5}, SYNC)
    assert told == []


def test_a_gate_without_a_threshold_is_never_too_closed(health):
    check, told = health
    config = check._config
    objective = config.objective.model_copy(update={"gate": "never"})
    check._config = config.model_copy(update={"objective": objective})
    check.look(HEALTHY | {"gate/fraction": 0.0}, SYNC)
    assert told == []


def test_what_a_bfloat16_run_starts_with_is_its_rounding(health):
    """A flat student was seen at 1.35: three times the excess is the bound from there on."""
    check, told = health
    for error in (1.35, 1.9, 2.0):
        check.look(HEALTHY | {"mismatch/mult_prob_error": error}, SYNC)
    assert told == []
    check.look(HEALTHY | {"mismatch/mult_prob_error": 2.2}, SYNC)
    assert len(told) == 1 and "the 0.35 that rounding makes" in told[0]


def test_a_probe_that_warns_is_passed_on(health):
    check, told = health
    check.look(HEALTHY, SyncReport(1, 0.0, 0, probe=Probe(0.2, "warn", "look at it")))
    assert told == ["WARNING (told once): look at it"]


def test_a_batch_of_references_alone_is_no_baseline(health):
    """It has neither a length nor a mismatch of its own."""
    check, told = health
    alone = {k: v for k, v in HEALTHY.items() if not k.startswith(("rollout/", "mismatch/"))}
    check.look(alone | {"entropy/student_mean": 5.0}, SYNC)
    check.look(HEALTHY, SYNC)
    check.look(HEALTHY | {"entropy/student_mean": 0.2}, SYNC)
    assert told == []


def test_the_few_samples_of_a_warm_up_are_not_judged(health):
    check, told = health
    check.look(
        HEALTHY | {"rollout/truncated_fraction": 1.0, "rollout/reference_fraction": 0.9}, SYNC
    )
    assert told == []


def test_a_first_iteration_far_from_rounding_is_no_baseline(health):
    check, told = health
    check.look(HEALTHY | {"mismatch/mult_prob_error": 60.0}, SYNC)
    assert len(told) == 1 and "engine and trainer disagree" in told[0]


def test_the_baseline_of_the_mismatch_is_its_first_value(health):
    """An iteration may have samples, and references alone in its first optimizer step."""
    check, told = health
    check.look({k: v for k, v in HEALTHY.items() if k != "mismatch/mult_prob_error"}, SYNC)
    for error in (1.35, 1.9):
        check.look(HEALTHY | {"mismatch/mult_prob_error": error}, SYNC)
    assert told == []


def test_a_mismatch_that_is_no_number_is_told_at_once(health):
    """And is no baseline: rounding is what was expected."""
    check, told = health
    check.look(HEALTHY | {"mismatch/mult_prob_error": nan}, SYNC)
    assert len(told) == 1 and "is nan, more than" in told[0] and "the 0.1 that" in told[0]
