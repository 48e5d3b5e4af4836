"""What the commands have in common: CONFIG.toml section.key=value …, --help, one line per error.

Imports torch and Megatron only once the options are known to be right: --help and a mistyped option
answer at once.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_eopd.config import Config, Option, describe_options, load_config
from megatron_eopd.errors import ConfigError, ExpectedError


def make_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose --help ends with the examples and every option of the configuration."""
    options = "\n".join(_help_of(option) for option in describe_options())
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""examples:
{examples}
options, with their defaults (section.key=value on the command line, or in the file; the word none
unsets an option):
{options}
""",
    )
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="win over the file"
    )
    return parser


def _help_of(option: Option) -> str:
    values = f"\n      One of {', '.join(option.values)}." if option.values else ""
    return f"  {option.name}={option.default}\n      {' '.join(option.text.split())}{values}"


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def finite(text: str) -> float:
    """An argparse type: a finite number from 0 on. What is compared with NaN is never too large."""
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{number} is not a finite number from 0 on")
    return number


def run_command(config_path: Path, overrides: Sequence[str], work: Callable[[Config], None]) -> int:
    """0, or 1 after an error that the user can act on, told in one message without a traceback."""
    try:
        config = load_config(config_path, overrides)
    except ConfigError as error:
        return _tell(error)

    try:
        work(config)
    except ExpectedError as error:
        return _tell(error)
    return 0


def _tell(error: Exception) -> int:
    from megatron_eopd.run_log import tell_torchrun

    tell_torchrun(f"error: {error}")
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 1
