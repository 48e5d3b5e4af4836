"""Which steps are skipped, from their gradient norms alone."""

import json
from math import nan

import pytest

from megatron_eopd.config import TrainingConfig
from megatron_eopd.records import StepFault, StepReport
from megatron_eopd.training.skipping import StepGuard

FAULT = StepFault("spike", "", {})
NORMS = [1.0, 1.1, 0.9, 1.2, 9.0, 1.0, 0.1 + 0.2, 30.0, 1.0, 1.1, 5.0, 1.0]


def spikes(guard: StepGuard, norms: list[float]) -> list[bool]:
    """Which of them are, each being judged by those before."""
    found = []
    for norm in norms:
        bound = guard.skip_above()
        found.append(bound is not None and norm > bound)
        guard.note(StepReport(norm, 1e-3, {}, {}, FAULT if found[-1] else None))
    return found


def training(**options) -> TrainingConfig:
    return TrainingConfig(**{"skip_grad_norm_factor": 4, "skip_grad_norm_window": 6} | options)


def test_a_spike_is_a_multiple_of_the_median():
    """Spikes in the window do not hide the next one, and nothing is skipped before half of the
    window is known."""
    found = spikes(StepGuard(training()), NORMS)
    assert [norm for norm, skipped in zip(NORMS, found, strict=True) if skipped] == [9, 30, 5]
    assert not any(spikes(StepGuard(training(skip_grad_norm_window=100)), NORMS))
    assert not spikes(StepGuard(training()), [1.0, 1.0, 100.0])[-1]


def test_a_norm_that_stays_high_is_no_spike():
    found = spikes(StepGuard(training()), [1.0] * 6 + [10.0] * 6)
    assert found == [False] * 6 + [True] * 3 + [False] * 3


def test_without_the_option_nothing_is_bounded_or_kept():
    guard = StepGuard(TrainingConfig())
    assert not any(spikes(guard, NORMS)) and guard.grad_norms == ()


def test_a_gradient_without_a_norm_is_not_in_the_median():
    guard = StepGuard(training(), [1.0] * 5)
    guard.note(StepReport(nan, 1e-3, {}, {}, FAULT))
    assert guard.grad_norms == (1.0,) * 5 and guard.skip_above() == 4


@pytest.mark.parametrize("stop", range(len(NORMS)))
def test_a_guard_that_goes_on_decides_like_one_that_was_not_stopped(stop):
    """From its two numbers of state, as JSON keeps them."""
    straight = StepGuard(training())
    expected = spikes(straight, NORMS)
    first = StepGuard(training())
    found = spikes(first, NORMS[:stop])
    state = json.loads(json.dumps([first.grad_norms, first.skipped_in_a_row]))
    second = StepGuard(training(), *state)
    found += spikes(second, NORMS[stop:])
    assert found == expected
    assert second.grad_norms == straight.grad_norms
    assert second.skipped_in_a_row == straight.skipped_in_a_row
