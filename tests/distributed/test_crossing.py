"""Options in pairs: right, or refused by name. `make test-matrix` has every three.

Right is what a single process finds, with the plain head, payload and schedule: loss, KL terms of
every token, gradient of every parameter. In bfloat16 to what two orders of summation differ by; a
term that is lost or doubled, or a reduction that is missing, is far beyond either.
"""

from itertools import combinations, product

import pytest

from tests.distributed.crossing import (
    AXES,
    OPTIONS,
    alone,
    case_of,
    cross,
    half_of_all,
    is_right,
    near_logprobs,
    refusal,
    run,
)
from tests.distributed.test_parallelism import make_models, unequal_rollouts


@pytest.fixture(scope="module")
def crossing():
    return cross(strength=2)


def test_every_pair_is_run_or_refused_by_name(crossing):
    held = {pair for setting in crossing.settings for pair in combinations(setting.items(), 2)}
    every = {
        ((a, x), (b, y)) for a, b in combinations(AXES, 2) for x, y in product(AXES[a], AXES[b])
    }
    assert held | crossing.refused.keys() == every and not held & crossing.refused.keys()
    assert all(refusal(alone(setting)) is None for setting in crossing.settings)
    for pair, messages in crossing.refused.items():
        named = [
            message
            for message in messages
            if all(any(option in message for option in OPTIONS[axis]) for axis, _ in pair)
        ]
        assert named, f"{pair} is refused without a word about both: {messages}"


def test_every_pair_gives_what_one_process_gives(crossing, tmp_path, capsys):
    models = make_models(tmp_path / "models")
    rollouts = near_logprobs(models["student"], half_of_all(unequal_rollouts(16, seed=11)), 0.8)
    (tmp_path / "runs").mkdir()
    distances = run(crossing.settings, models, rollouts, tmp_path / "runs")
    wrong = [
        f"\n{case_of(setting).describe()}: {distance}\n  {setting}"
        for setting, distance in zip(crossing.settings, distances, strict=True)
        if not is_right(setting, distance)
    ]
    assert not wrong, "".join(wrong)
    worst = max(distances, key=lambda far: far.gradients)
    with capsys.disabled():
        print(f"\n  {len(distances)} runs, {len(crossing.refused)} pairs refused; {worst}")
