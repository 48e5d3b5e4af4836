"""Two evaluations of the same problems. In: what each wrote. Out: Markdown that says what differs,
how surely, and how large a difference would have to be for such a set to show it.

Only what was sampled and graded alike is compared, figure by figure, on each problem's two values.
"""

import re
from collections.abc import Sequence
from math import isinf
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.estimators import highest, per_problem
from megatron_eopd.evaluation.intervals import Paired, paired
from megatron_eopd.evaluation.report_text import described, number, table, told
from megatron_eopd.evaluation.reports import Report, read_reports

SEED = 0xC0DE
"""Of draws and exchanges, so that the same two reports give the same text."""
LEVEL = 0.05
MAY_DIFFER = {
    "seed": "the draws of A and B are independent",
    "tokenizer": "lengths, and the share that was cut, are counted in other tokens",
    "stop_ids": "responses end at other tokens",
    "engine": "some of a difference may be the engines'",
    "dtype": "some of a difference may be the rounding's",
    "grading_timeout_s": "slow grading is given up elsewhere",
}
"""Setting → what follows for a reader. Every other one must be equal."""
_NOT_COMPARED = ("verdict/", "grader_disagreement")
_NEUTRAL = ("distinct@", "length_mean", "truncated_fraction")
"""Figures of which more is not better."""


def compare(path_a: Path, path_b: Path) -> str:
    """Both are a TASK.json, or a directory of them.

    Raises:
        ConfigError: a report that is missing or damaged, no task in both, or reports that were not
            sampled alike, with each setting and its two values.
    """
    a, b = read_reports(path_a), read_reports(path_b)
    common = [task for task in a if task in b]
    if not common:
        raise ConfigError(
            f"no task in common: {path_a} has {', '.join(a)}, {path_b} has {', '.join(b)}. Name "
            f"two evaluations of the same task."
        )
    for task in common:
        check_alike(a[task], b[task])
    alone = [
        f"Only {label} has {', '.join(tasks)}."
        for label, tasks in (("A", sorted(a.keys() - b.keys())), ("B", sorted(b.keys() - a.keys())))
        if tasks
    ]
    head = [f"A is `{path_a}`; B is `{path_b}`.", *alone]
    return "\n\n".join([*head, *(_compare_task(a[task], b[task]) for task in common)]) + "\n"


def check_alike(a: Report, b: Report) -> None:
    told_a, told_b = dict(a.settings), dict(b.settings)
    names = [n for n in {**told_a, **told_b} if n not in MAY_DIFFER]
    different = [n for n in names if told_a.get(n) != told_b.get(n)]
    if different:
        values = "; ".join(
            f"{name}: A {told(told_a.get(name))}, B {told(told_b.get(name))}" for name in different
        )
        raise ConfigError(
            f"{a.task}: A and B were not sampled and graded alike, so a difference would say "
            f"nothing about the models. {values}. Evaluate one of them again with the other's."
        )
    pairs = zip(a.problems, b.problems, strict=True)
    for n, (x, y) in enumerate(pairs, start=1):
        if x.id != y.id:
            raise ConfigError(
                f"{a.task}: problem {n} is {x.id} in A and {y.id} in B. Compare reports as they "
                f"were written, of the same problems in one order."
            )


# --- one task -----------------------------------------------------------------------------------


class Row(NamedTuple):
    """One figure of both."""

    name: str
    a: float
    b: float
    paired: Paired

    @property
    def is_shown(self) -> bool:
        """Whether the set shows a difference."""
        pair = self.paired
        return pair.p_value < LEVEL and not pair.low <= 0 <= pair.high

    @property
    def cells(self) -> tuple[str, ...]:
        pair = self.paired
        ends = f"[{number(pair.low, sign=True)}, {number(pair.high, sign=True)}]"
        p = "< 0.001" if pair.p_value < 0.001 else f"{pair.p_value:.3f}"
        difference = number(pair.difference, sign=True)
        return (self.name, number(self.a), number(self.b), difference, ends, p, _smallest(pair))


def _compare_task(a: Report, b: Report) -> str:
    rows = rows_of(a, b)
    header = ("figure", "A", "B", "B − A", "95 % interval", "p", "smallest to be seen")
    parts = [
        f"## {a.task}",
        _verdict(rows, a.settings.num_problems),
        table(header, [row.cells for row in rows]),
        f"{a.settings.num_problems:,} problems in pairs, {a.settings.num_samples} samples of each; "
        f"avg@{a.settings.num_samples} is also pass@1. p: how often exchanging A and B at random "
        f"makes a difference this large. Smallest to be seen: the true difference that such a set "
        f"shows in 80 % of evaluations. Of {len(rows)} figures, which go together, one in 20 has "
        f"p < {LEVEL} by chance.",
        f"A: {described(a.model)}. B: {described(b.model)}.",
        *_notes(a, b),
    ]
    return "\n\n".join(parts)


def rows_of(a: Report, b: Report) -> list[Row]:
    ks = sorted(
        int(name.removeprefix("pass@"))
        for name in a.figures.keys() & b.figures.keys()
        if re.fullmatch(r"pass@\d+", name) and name != "pass@1"
    )
    values_a, values_b = per_problem(a.outcomes, ks), per_problem(b.outcomes, ks)
    longest = a.settings.max_response_length
    return [
        _row(name, values_a[name], values_b[name], highest(name, longest))
        for name in values_a
        if name in values_b and not name.startswith(_NOT_COMPARED)
    ]


def _row(name: str, a_P: np.ndarray, b_P: np.ndarray, ceiling: float) -> Row:
    pair = paired(a_P, b_P, SEED, highest=ceiling)
    return Row(name, float(np.nanmean(a_P)), float(np.nanmean(b_P)), pair)


def _verdict(rows: Sequence[Row], num_problems: int) -> str:
    told_rows = [row for row in rows if row.is_shown]
    up = [r for r in told_rows if r.paired.difference > 0]
    down = [r for r in told_rows if r.paired.difference < 0]
    kinds = [
        ("better on", [r for r in up if not r.name.startswith(_NEUTRAL)]),
        ("worse on", [r for r in down if not r.name.startswith(_NEUTRAL)]),
        ("higher in", [r for r in up if r.name.startswith(_NEUTRAL)]),
        ("lower in", [r for r in down if r.name.startswith(_NEUTRAL)]),
    ]
    found = [f"{word} {', '.join(r.name for r in own)}" for word, own in kinds if own]
    sentence = f"**B is {'; '.join(found)}.**" if found else "**No difference can be seen.**"
    return f"{sentence} {_limit(rows, num_problems)}"


def _limit(rows: Sequence[Row], num_problems: int) -> str:
    if isinf(rows[0].paired.smallest_detectable):
        return f"{num_problems} problems are too few to show any."
    limits = [
        f"under {_smallest(r.paired)} in {r.name}"
        for r in rows
        if r.name.startswith(("pass@", "avg@", "maj@"))
    ]
    return (
        f"On {num_problems:,} problems, differences {', '.join(limits)} are likely to stay unseen."
    )


def _smallest(pair: Paired) -> str:
    return "none" if isinf(pair.smallest_detectable) else number(pair.smallest_detectable)


def _notes(a: Report, b: Report) -> list[str]:
    told_a, told_b = dict(a.settings), dict(b.settings)
    notes = [
        f"Note: {name} is {told(told_a.get(name))} in A and {told(told_b.get(name))} in B: {what}."
        for name, what in MAY_DIFFER.items()
        if told_a.get(name) != told_b.get(name)
    ]
    same_seed = "Note: A and B were drawn with the same seed, so their draws are paired too."
    return notes if told_a["seed"] != told_b["seed"] else [*notes, same_seed]
