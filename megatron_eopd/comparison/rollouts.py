"""Recorded rollouts of two runs: the first line that differs, file by file."""

import json
from pathlib import Path

from megatron_eopd.comparison.parts import SHOWN, Part, Run, same


def compare_rollouts(a: Run, b: Run, rtol: float) -> Part:
    part = Part("rollouts")
    x, y = ({p.name: p for p in run.path.glob("rollouts/[0-9]*.jsonl")} for run in (a, b))
    for label, alone in (("A", x.keys() - y.keys()), ("B", y.keys() - x.keys())):
        if alone:
            part.problems.append(f"only {label} has {len(alone)} file(s), {min(alone)}")
    both = sorted(x.keys() & y.keys())
    found = (_first_difference(x[name], y[name], rtol) for name in both)
    part.problems += [each for each in found if each][:SHOWN]
    part.summary = f"{len(both)} files" if x or y else "none recorded"
    return part


def _first_difference(a: Path, b: Path, rtol: float) -> str | None:
    # Bytes: as text, a line would also end at the U+2028 that may stand inside a JSON string.
    lines = [path.read_bytes().splitlines() for path in (a, b)]
    for number, pair in enumerate(zip(*lines, strict=False), start=1):
        x, y = map(json.loads, pair)
        for name in sorted(x.keys() | y.keys()):
            if not same(x.get(name), y.get(name), rtol):
                values = f"A {x.get(name)!s:.60}, B {y.get(name)!s:.60}"
                return f"{a.name} line {number}, {name}: {values}"
    if len(lines[0]) != len(lines[1]):
        return f"{a.name}: A has {len(lines[0])} lines, B {len(lines[1])}"
    return None
