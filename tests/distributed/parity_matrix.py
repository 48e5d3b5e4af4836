"""The whole gradient-parity matrix: `make test-matrix`. Writes every run into
docs/parallelism_matrix.md, and a summary into docs/parallelism.md.

Every combination of the student's TP, PP, VPP, CP, SP and DP that fits 8 processes, and a list of
teacher layouts, each with every payload, against a single process. Exits with 1 if any of them is
farther from it than 1e-5.
"""

import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from tests.distributed.parity import PAYLOADS, Case, Distance, distance, run_cases
from tests.distributed.test_parallelism import (
    TOLERANCE,
    make_expert_models,
    make_models,
    own_layout,
    unequal_rollouts,
)

PAGE = Path(__file__).parents[2] / "docs/parallelism_matrix.md"
SUMMARY_PAGE = PAGE.with_name("parallelism.md")
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
MOST_RANKS = 8


def student_layouts() -> list[dict]:
    """Interleaving needs stages, and sequence parallelism tensor-parallel ranks."""
    found = []
    sizes = product((1, 2, 4), (1, 2), (1, 2), (1, 2), (False, True), (1, 2))
    for tp, pp, vpp, cp, sp, dp in sizes:
        if tp * pp * cp * dp <= MOST_RANKS and (vpp == 1 or pp > 1) and (tp > 1 or not sp):
            found.append({"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "sp": sp, "dp": dp})
    return found


def separate(ranks: int, tp: int = 1, pp: int = 1) -> dict:
    return own_layout(tp=tp, pp=pp, placement="separate", world_size=ranks)


TEACHER_LAYOUTS = [
    {"tp": 4, "teacher": own_layout(tp=2, pp=2)},
    {"tp": 2, "pp": 2, "teacher": own_layout(tp=4, sp=True)},
    {"tp": 2, "pp": 2, "vpp": 2, "sp": True, "dp": 2, "teacher": own_layout(tp=4, pp=2)},
    {"tp": 1, "dp": 4, "teacher": own_layout(tp=2, pp=2)},
    {"tp": 2, "cp": 2, "sp": True, "dp": 2, "teacher": own_layout(pp=4)},
    {"pp": 2, "cp": 2, "dp": 2, "teacher": own_layout(tp=2)},
    {"tp": 4, "teacher": separate(4, tp=2, pp=2)},
    {"tp": 2, "pp": 2, "vpp": 2, "teacher": separate(4, pp=4)},
    {"cp": 2, "dp": 2, "teacher": separate(2, tp=2)},
    {"tp": 2, "dp": 2, "sp": True, "teacher": separate(3)},
]
EXPERT_LAYOUTS = [
    {"dp": 2, "ep": 2},
    {"dp": 4, "ep": 4},
    {"tp": 2, "sp": True},
    {"tp": 2, "sp": True, "ep": 2},
    {"tp": 2, "sp": True, "dp": 2, "ep": 4},
    {"pp": 2, "vpp": 2, "dp": 2, "ep": 2},
    {"cp": 2, "dp": 2, "ep": 2},
    {"tp": 2, "sp": True, "pp": 2, "ep": 2, "teacher": own_layout(tp=4, sp=True)},
]


def run_group(title: str, layouts: list[dict], models: dict, folder: Path) -> list[str]:
    """Lines of the table."""
    rollouts = unequal_rollouts(16, seed=11)
    alone = [Case(payload=payload) for payload in PAYLOADS]
    expected = dict(zip(PAYLOADS, run_cases(alone, models, rollouts, folder), strict=True))
    lines = []
    for layout in layouts:
        cases = [Case(**layout, payload=payload) for payload in PAYLOADS]
        for case, found in zip(cases, run_cases(cases, models, rollouts, folder), strict=True):
            far = distance(found, expected[case.payload])
            lines.append(line_of(title, case, far))
            print(lines[-1], flush=True)
    return lines


def line_of(title: str, case: Case, far: Distance) -> str:
    layout, payload = case.describe().rsplit(" | ", 1)
    worst = max(far.loss, far.terms, far.gradients)
    mark = "" if worst < TOLERANCE else " **too far**"
    layout = layout.replace(" | ", ", ")
    numbers = f"{far.loss:.1e} | {far.terms:.1e} | {far.gradients:.1e}{mark}"
    return f"| {title} | {layout} | {payload} | {numbers} |"


def summary(lines: list[str]) -> list[str]:
    """One line for each kind of layout: how many runs, and the farthest of each figure."""
    kinds: dict[tuple[str, str], list[list[float]]] = {}
    for line in lines:
        models, layout, _, *distances = (cell.strip() for cell in line.strip("|").split("|"))
        figures = [float(distance.split()[0]) for distance in distances]
        kinds.setdefault((models, teacher_of(layout)), []).append(figures)
    return [
        f"| {models} | {teacher} | {len(rows)} | "
        + " | ".join(f"{max(column):.1e}" for column in zip(*rows, strict=True))
        + " |"
        for (models, teacher), rows in kinds.items()
    ]


def teacher_of(layout: str) -> str:
    if "ranks of its own" in layout:
        return "a layout and ranks of its own"
    return "a layout of its own, on the same ranks" if "teacher" in layout else "as the student"


def write(lines: list[str], minutes: float) -> None:
    head = [
        f"{len(lines)} runs in {minutes:.0f} minutes on two CPU cores (gloo, float32). Relative to "
        f"a single process: loss and gradient norm; the KL terms and entropies of all tokens; the "
        f"gradient of the parameter that is farthest.",
        "",
    ]
    every_run = ["| models | layout | payload | loss, norm | terms | gradients |", "|---" * 6 + "|"]
    farthest = ["| models | teacher | runs | loss, norm | terms | gradients |", "|---" * 6 + "|"]
    replace_between_marks(PAGE, [*head, *every_run, *lines])
    replace_between_marks(SUMMARY_PAGE, [*head, *farthest, *summary(lines)])


def replace_between_marks(page: Path, lines: list[str]) -> None:
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join(lines)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main() -> int:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense, experts = make_models(folder / "dense"), make_expert_models(folder / "experts")
        (folder / "runs").mkdir()
        lines = run_group("dense", student_layouts() + TEACHER_LAYOUTS, dense, folder / "runs")
        lines += run_group("8 experts", EXPERT_LAYOUTS, experts, folder / "runs")
    write(lines, (time.monotonic() - begin) / 60)
    wrong = [line for line in lines if "too far" in line]
    print(f"{len(lines)} runs, {len(wrong)} too far; the table is in {PAGE.name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
