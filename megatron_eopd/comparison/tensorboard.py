"""TensorBoard's steps of a run: as in its metrics.jsonl, none twice and none missing."""

import logging
from collections.abc import Iterator

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_eopd.comparison.parts import Part, Run, listed, relative

FLOAT32 = 1e-6
"""TensorBoard keeps values in float32; relative."""


def compare_tensorboard(a: Run, b: Run) -> Part:
    """Each run's with its own metrics.jsonl, which has just been compared with the other's."""
    part = Part("tensorboard")
    has = {run: (run.path / "tensorboard").is_dir() for run in (a, b)}
    for run in (a, b):
        if has[run]:
            part.problems += tensorboard_problems(run)
        elif any(has.values()):
            part.problems.append(f"{run.label} has none")
    part.summary = "steps and values as in metrics.jsonl" if any(has.values()) else "none"
    return part


def tensorboard_problems(run: Run) -> Iterator[str]:
    # It would tell of every resume, behind which steps are written again.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown: dict[tuple[int, str], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            shown.setdefault((event.step, name), []).append(event.value)
    written = {(row["iteration"], n): v for row in run.rows for n, v in row.items()}
    expected = {key: value for key, value in written.items() if key[1] != "iteration"}
    wrong = {
        "doubled": {key for key, values in shown.items() if len(values) > 1},
        "missing": expected.keys() - shown.keys(),
        "not in metrics.jsonl": shown.keys() - expected.keys(),
        "of another value": {
            key
            for key in shown.keys() & expected.keys()
            if relative(shown[key][-1], expected[key]) > FLOAT32
        },
    }
    for what, keys in wrong.items():
        if keys:
            steps, names = sorted({step for step, _ in keys}), sorted({n for _, n in keys})
            yield f"{run.label}: {what}: step(s) {listed(steps)} of {len(names)} tag(s), {names[0]}"
