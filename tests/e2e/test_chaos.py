"""A few faults of `make chaos`, on a run that is started again until it has ended."""

import pytest

from tests.chaos.__main__ import Progress, disturb
from tests.chaos.faults import FAULTS
from tests.chaos.plan import make_plan

SHORT = ("SIGKILL of all", "bit flip")


@pytest.mark.slow
def test_a_run_that_was_killed_and_damaged_ends_as_if_nothing_had_been(tmp_path):
    """Weights, optimizer, metrics and TensorBoard's steps to the last bit; nothing damaged is
    loaded, and no process stays."""
    faults = [fault for fault in FAULTS if fault.name in SHORT]
    progress = Progress(len(faults))
    plan = make_plan(len(faults), 7, faults, engine=False)
    assert disturb(plan, tmp_path, 3, progress) == 1
    assert sorted(outcome.fault for outcome in progress.outcomes) == sorted(SHORT)
    assert [problem for outcome in progress.outcomes for problem in outcome.problems] == []
