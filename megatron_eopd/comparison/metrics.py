"""metrics.jsonl of two runs: rows that one has alone, and the first value that differs."""

from collections import Counter
from collections.abc import Iterator

from megatron_eopd.comparison.parts import LEFT_OUT, SHOWN, Part, Run, listed, relative


def compare_metrics(a: Run, b: Run, rtol: float) -> Part:
    part = Part("metrics.jsonl")
    values = [{(i, n): v for i, n, v in run.metrics()} for run in (a, b)]
    for run, other in ((a, b), (b, a)):
        part.problems += doubled_rows(run)
        part.problems += rows_alone(run, other)
    off = [
        (iteration, name, x, values[1][iteration, name])
        for (iteration, name), x in sorted(values[0].items(), key=lambda item: item[0][0])
        if (iteration, name) in values[1] and relative(x, values[1][iteration, name]) > rtol
    ]
    if off:
        part.problems += [f"first difference: {told(*off[0])}", *worst_of_each(off)]
    names = {name for _, name in values[0].keys() | values[1].keys()}
    left_out = {n for run in (a, b) for row in run.rows for n in row if LEFT_OUT.match(n)}
    part.summary = f"{len(a.rows)} and {len(b.rows)} rows, {len(names)} metrics compared"
    if left_out:
        part.summary += f" (left out: {', '.join(sorted(left_out))})"
    return part


def told(iteration: int, name: str, x: float, y: float) -> str:
    return f"iteration {iteration}, {name}: A {x:.12g}, B {y:.12g} (relative {relative(x, y):.3g})"


def worst_of_each(off: list[tuple[int, str, float, float]]) -> Iterator[str]:
    """A line for each metric that differs: its largest difference, and in how many rows."""
    counts = Counter(name for _, name, _, _ in off)
    worst: dict[str, tuple[int, str, float, float]] = {}
    for each in off:
        name = each[1]
        if name not in worst or relative(*each[2:]) > relative(*worst[name][2:]):
            worst[name] = each
    ordered = sorted(worst.values(), key=lambda each: -relative(*each[2:]))
    for each in ordered[:SHOWN]:
        yield f"worst of {counts[each[1]]} row(s): {told(*each)}"
    if len(ordered) > SHOWN:
        yield f"… and {len(ordered) - SHOWN} more metrics, by less"


def doubled_rows(run: Run) -> Iterator[str]:
    seen = Counter((iteration, name) for iteration, name, _ in run.metrics())
    twice = sorted({iteration for (iteration, _), count in seen.items() if count > 1})
    if twice:
        yield f"{run.label} has iteration(s) {listed(twice)} more than once"


def rows_alone(run: Run, other: Run) -> Iterator[str]:
    """What one of the two has alone: iterations, and of those that both have, metrics."""
    own, theirs = ({(i, n) for i, n, _ in r.metrics()} for r in (run, other))
    iterations = {i for i, _ in theirs}
    alone = sorted({i for i, _ in own} - iterations)
    if alone:
        yield f"only {run.label} has iteration(s) {listed(alone)}"
    names: dict[str, list[int]] = {}
    for iteration, name in sorted(own - theirs):
        if iteration in iterations:
            names.setdefault(name, []).append(iteration)
    for name, where in names.items():
        yield f"only {run.label} has {name} in iteration(s) {listed(where)}"
