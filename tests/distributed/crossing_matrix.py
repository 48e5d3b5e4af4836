"""Every three options: a part of `make test-matrix`. Writes its table into docs/correctness.md.

Exits with 1 if any run is farther from a single process than tests.distributed.crossing allows.
"""

import sys
import tempfile
import time
from pathlib import Path

from tests.distributed.crossing import (
    MOST_RANKS,
    case_of,
    cross,
    half_of_all,
    is_right,
    near_logprobs,
    run,
    table,
)
from tests.distributed.parity_matrix import replace_between_marks
from tests.distributed.test_parallelism import make_models, unequal_rollouts

PAGE = Path(__file__).parents[2] / "docs/correctness.md"


def main() -> int:
    begin, crossing = time.monotonic(), cross(strength=3)
    with tempfile.TemporaryDirectory() as name:
        models = make_models(Path(name) / "models")
        rollouts = near_logprobs(models["student"], half_of_all(unequal_rollouts(16, seed=11)), 0.8)
        (Path(name) / "runs").mkdir()
        distances = run(crossing.settings, models, rollouts, Path(name) / "runs")
    pairs = zip(crossing.settings, distances, strict=True)
    wrong = [(setting, far) for setting, far in pairs if not is_right(setting, far)]
    for setting, far in wrong:
        print(f"too far: {case_of(setting).describe()}: {far}\n  {setting}")
    minutes = (time.monotonic() - begin) / 60
    replace_between_marks(
        PAGE,
        [
            f"{len(distances)} runs in {minutes:.0f} minutes on two CPU cores; "
            f"{len(wrong) or 'none'} too far. {len(crossing.refused)} combinations are refused, "
            f"{len(crossing.too_large)} more take more than {MOST_RANKS} ranks.",
            "",
            *table(crossing.settings, distances),
        ],
    )
    print(f"{len(distances)} runs, {len(wrong)} too far; the table is in {PAGE.name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
