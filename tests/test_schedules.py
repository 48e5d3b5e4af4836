"""Every schedule reads how far the run is from one record, also after a resume."""

import pytest

from megatron_eopd.config import TrainingConfig
from megatron_eopd.schedules import Progress, lr_at


def at(iterations: float, steps: int = 1000, train_iters: int = 100, **options) -> float:
    return lr_at(TrainingConfig(lr=1.0, **options), Progress(iterations, steps, train_iters))


def test_the_learning_rate_decays_over_iterations_and_stays():
    assert [at(i, lr_decay_style="linear") for i in (0, 50, 100, 150)] == [1.0, 0.5, 0.0, 0.0]
    assert at(50, min_lr=0.2) == pytest.approx(0.6) and at(25) == pytest.approx(0.853553)
    assert at(90, lr_decay_style="constant") == 1.0
    assert [at(i, lr_decay_style="linear", lr_decay_iters=20) for i in (10, 20, 90)] == [0.5, 0, 0]
    assert at(0.25, train_iters=1, lr_decay_style="linear") == 0.75, "within an iteration"


def test_the_warm_up_counts_steps_that_were_taken():
    warm = {"lr_warmup_steps": 4, "lr_decay_style": "constant"}
    assert [at(0, steps, **warm) for steps in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize("batch_size", [8, 16, 32])
def test_another_batch_size_is_at_the_same_place(batch_size):
    """Of 10 iterations with 4 steps each, 5 are done. Whatever the number of steps in the next, the
    rate begins where it was, and ends at 0."""
    options = {"lr_warmup_steps": 10, "lr_decay_style": "linear"}
    each = 32 // batch_size
    rates = [at(5 + n / each, 20 + n, 10, **options) for n in range(5 * each + 1)]
    assert rates[0] == 0.5 and rates[-1] == 0
    assert rates == sorted(rates, reverse=True)
