"""What the terminal shows of an iteration."""

import pytest

from megatron_eopd.reporting.lines import WIDTH, step_line

SCALARS = {
    "loss/total": 0.43121,
    "loss/reverse_kl": 0.38,
    "gate/fraction": 0.21,
    "entropy/teacher_mean": 0.74,
    "entropy/student_mean": 0.69,
    "rollout/length_mean": 812.4,
    "rollout/reference_fraction": 0.0,
    "optim/skipped_steps": 0,
    "throughput/tokens_per_s": 8123.0,
    "time/total": 9.84,
}


def test_a_line_has_what_to_watch_first():
    assert step_line(12, 200, SCALARS, 3725.4) == (
        "step 12/200 | loss 0.4312 | rev_kl 0.380 | gate 0.21 | H 0.74/0.69 | len 812 | 9.8 s | "
        "ETA 1:02:05"
    )


@pytest.mark.parametrize("iteration", [1, 12345])
@pytest.mark.parametrize("remaining_s", [None, 59.0, 9e6])
@pytest.mark.parametrize("references", [0.0, 0.25])
@pytest.mark.parametrize("skipped", [0, 4])
@pytest.mark.parametrize("size", [1.0, 1e6])
def test_a_line_fits_a_terminal(iteration, remaining_s, references, skipped, size):
    """And keeps where the run is, its loss, skipped steps and the end in sight."""
    scalars = {name: value * size for name, value in SCALARS.items()}
    scalars |= {"rollout/reference_fraction": references, "optim/skipped_steps": skipped}
    line = step_line(iteration, 20000, scalars, remaining_s)
    assert len(line) <= WIDTH, line
    assert line.startswith(f"step {iteration}/20000 | loss ")
    assert ("skipped 4" in line) == bool(skipped) and ("ETA" in line) == (remaining_s is not None)


def test_what_was_not_measured_is_left_out():
    """Every step was skipped, or all answers are references."""
    bare = {"rollout/reference_fraction": 1.0, "optim/skipped_steps": 4, "time/total": 1.0}
    assert step_line(1, 2, bare, None) == "step 1/2 | references 100% | skipped 4 | 1.0 s"
