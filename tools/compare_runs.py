#!/usr/bin/env python3
"""Whether two runs are the same, and where they part.

In: two RUN_DIRs. Out: the first step and metric that differ, how far each metric and tensor is off,
and what the two were told differently. Compared are metrics.jsonl, TensorBoard's steps with it, the
newest checkpoints tensor by tensor (weights and optimizer, whatever the layouts), the exports in
hf/ and recorded rollouts. Options are shown and not counted, and clocks and gauges are left out.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_eopd.cli import finite
from megatron_eopd.config import changed_options
from megatron_eopd.errors import ConfigError, ExpectedError

EXAMPLES = """\
examples:
  python tools/compare_runs.py runs/straight runs/resumed
  python tools/compare_runs.py runs/straight runs/resumed --assert-equal     # to the last bit
  python tools/compare_runs.py runs/tp2 runs/pp2 --assert-equal --rtol 1e-5  # other layouts
  python tools/compare_runs.py runs/a runs/b --iteration 100                 # an older checkpoint

Exit status: 0; with --assert-equal 1 if anything differs; 2 if there is nothing to compare."""


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_a", type=Path, metavar="RUN_A")
    parser.add_argument("run_b", type=Path, metavar="RUN_B")
    parser.add_argument("--assert-equal", action="store_true", help="exit with 1 if they differ")
    parser.add_argument(
        "--rtol",
        type=finite,
        default=0.0,
        metavar="X",
        help="largest relative difference of a number; of a tensor: its largest difference over "
        "its largest value. Default: 0, equal to the last bit",
    )
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="compare these checkpoints, not the newest"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    try:
        different = compare(args)
    except ExpectedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    how = f"within a relative {args.rtol:g}" if args.rtol else "to the last bit"
    print(f"different: {', '.join(different)}" if different else f"equal {how}")
    return 1 if different and args.assert_equal else 0


def compare(args: argparse.Namespace) -> list[str]:
    """Print what is found; return what differs."""
    for path in (args.run_a, args.run_b):
        check_is_run(path)
    # With torch, so only now.
    from megatron_eopd.comparison.checkpoints import compare_checkpoints
    from megatron_eopd.comparison.exports import compare_exports
    from megatron_eopd.comparison.metrics import compare_metrics
    from megatron_eopd.comparison.parts import Run
    from megatron_eopd.comparison.rollouts import compare_rollouts
    from megatron_eopd.comparison.tensorboard import compare_tensorboard

    a, b = Run("A", args.run_a), Run("B", args.run_b)
    print(f"A  {a.path}\nB  {b.path}")
    tell_options(a.path, b.path)
    parts = [
        compare_metrics(a, b, args.rtol),
        compare_tensorboard(a, b),
        compare_checkpoints(a, b, args.rtol, args.iteration),
        compare_exports(a, b, args.rtol),
        compare_rollouts(a, b, args.rtol),
    ]
    for part in parts:
        print(f"{part.name}: {part.summary}{': DIFFERENT' if part.problems else ''}")
        print("".join(f"  {problem}\n" for problem in part.problems), end="")
    return [part.name for part in parts if part.problems]


def check_is_run(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory. Give the run_dir of a run.")
    if not (path / "metrics.jsonl").is_file() and not (path / "checkpoints").is_dir():
        raise ConfigError(
            f"{path}: neither metrics.jsonl nor checkpoints in it. Give the run_dir of a run."
        )


def tell_options(a: Path, b: Path) -> None:
    """They are often why one compares, so they do not count."""
    saved = [path / "config.json" for path in (a, b)]
    if all(path.is_file() for path in saved):
        for change in changed_options(*(json.loads(path.read_text()) for path in saved)):
            print(f"option {change}")


if __name__ == "__main__":
    sys.exit(main())
