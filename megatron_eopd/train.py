"""Train a student by on-policy distillation: the entry point.

    torchrun --nproc_per_node=2 -m megatron_eopd.train CONFIG.toml section.key=value …

Imports torch and Megatron only once the options are known to be right: --help and a mistyped option
answer at once. What happens then is in megatron_eopd.distill.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_eopd.config import Config, ConfigError, describe_options, load_config


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    options = "\n".join(
        f"  {name}={default}\n      {' '.join(text.split())}"
        for name, default, text in describe_options()
    )
    parser = argparse.ArgumentParser(
        prog="python -m megatron_eopd.train",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""examples:
  torchrun --nproc_per_node=2 -m megatron_eopd.train examples/quickstart/eopd.toml
  torchrun --nproc_per_node=8 -m megatron_eopd.train run.toml objective.entropy_threshold=0.5
  python -m megatron_eopd.train examples/quickstart/eopd.toml --dry-run --world-size 2

The same command again resumes from the newest complete checkpoint of run_dir.

options, with their defaults (section.key=value on the command line, or in the file):
{options}
""",
    )
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="win over the file"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration and derived numbers, and stop",
    )
    parser.add_argument(
        "--world-size", type=int, help="ranks to assume in a dry run; default TP × PP"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 after an error that the user can act on, told in one message without a traceback."""
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
    except ConfigError as error:
        return _tell(error)
    return _start(config, parsed)


def _start(config: Config, parsed: argparse.Namespace) -> int:
    from megatron_eopd import distill

    try:
        if parsed.dry_run:
            distill.dry_run(config, parsed.world_size)
        else:
            distill.run(config)
    except distill.EXPECTED_ERRORS as error:
        return _tell(error)
    return 0


def _tell(error: Exception) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
