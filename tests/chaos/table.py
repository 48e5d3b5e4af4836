"""Outcomes as a Markdown table, for docs/reliability.md."""

import re
from collections.abc import Sequence

from tests.chaos.harness import Outcome

SAID = 150
"""Characters of a message that are shown."""


def markdown(outcomes: Sequence[Outcome], seed: int, runs: int, seconds: float) -> str:
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    rows = "".join(_row(number, each) for number, each in enumerate(outcomes, start=1))
    return (
        f"{len(outcomes)} faults with seed {seed} over {runs} runs in {seconds / 60:.0f} minutes: "
        f"{failed} failed.\n\n"
        f"| | fault | what, when | what the run said | brought back by | s | result |\n"
        f"|---|---|---|---|---|---|---|\n{rows}"
    )


def _row(number: int, outcome: Outcome) -> str:
    result = "; ".join(outcome.problems) or "ok"
    cells = (outcome.fault, outcome.did, _short(outcome.said) or "–", outcome.came_back)
    text = " | ".join(cell.replace("|", "\\|") for cell in cells)
    return f"| {number} | {text} | {outcome.seconds:.1f} | {_short(result)} |\n"


def _short(text: str) -> str:
    """Without the folders of paths, which are of the machine alone."""
    text = re.sub(r"/\S*/(?=[^/\s]+)", "…/", " ".join(text.split()))
    return text if len(text) <= SAID else text[:SAID] + " …"
