#!/usr/bin/env python3
"""The checkpoints of a run: which there are, and whether they are what was written.

In: RUN_DIR. Out: a line for each checkpoint. `list` looks at names, sizes and small files, `verify`
at every byte, against the sums that lie beside them in checksums.json.
"""

import argparse
import sys
import time
from pathlib import Path

from megatron_eopd.checkpoints import files
from megatron_eopd.errors import CheckpointError, ConfigError

EXAMPLES = """\
examples:
  python tools/checkpoints.py list runs/mine
  python tools/checkpoints.py verify runs/mine              # all of them
  python tools/checkpoints.py verify runs/mine --iteration 120

Exit status: 0 if all that were looked at are sound, 1 if not, 2 if the arguments are wrong."""


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("list", "verify"))
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--iteration", type=int, metavar="N", help="of one checkpoint alone")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    try:
        directories = chosen(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = [describe(directory, args.command == "verify") for directory in directories]
    return 0 if all(results) else 1


def chosen(args: argparse.Namespace) -> list[Path]:
    """By age in the run; also those that were never finished."""
    found = (args.run_dir / "checkpoints").glob("[0-9]*")
    directories = sorted(filter(_place, found), key=lambda path: (_place(path), path.suffix))
    if not directories:
        raise ConfigError(f"{args.run_dir}: no checkpoints there. Give the run_dir of a run.")
    if args.iteration is None:
        return directories
    of_iteration = [path for path in directories if _place(path)[0] == args.iteration]
    if not of_iteration:
        there = ", ".join(path.name for path in directories)
        raise ConfigError(f"{args.run_dir}: none of iteration {args.iteration}. There are {there}.")
    return of_iteration


def _place(path: Path) -> tuple[int, int] | None:
    return files.place_of(Path(path.stem))


def describe(directory: Path, verifies: bool) -> bool:
    """Print its line; whether it is sound. What has not got its name yet is no checkpoint, and
    not wrong."""
    if directory.suffix:
        print(f"{directory.name:<17}  being written, or left by a save that was broken off")
        return True
    size = sum(path.stat().st_size for path in directory.iterdir())
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(directory.stat().st_mtime))
    problems = problems_of(directory, verifies)
    state = "; ".join(problems) or ("verified" if verifies else "complete")
    print(f"{directory.name:<17}  {size / 2**20:>12,.1f} MiB  {written}  {state}", flush=True)
    return not problems


def problems_of(directory: Path, verifies: bool) -> list[str]:
    if not (directory / files.DONE).is_file():
        return ["never finished"]
    if not verifies:
        return files.quick_problems(directory)
    try:
        sums = files.read_sums(directory)
    except CheckpointError as error:
        return [str(error)]
    if sums is None:
        return ["has no checksums.json: it cannot be verified"]
    return files.problems_of(directory, sums, sums)


if __name__ == "__main__":
    sys.exit(main())
