"""What the commands have in common: CONFIG.toml section.key=value …, --help, one line per error.

Imports torch and Megatron only once the options are known to be right: --help and a mistyped option
answer at once.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_eopd.config import (
    Config,
    DataConfig,
    Option,
    describe_options,
    parse_value,
)
from megatron_eopd.errors import ConfigError, ExpectedError, disk_error, tell_torchrun


def make_parser(
    command: str, description: str, examples: str, *, needs_config: bool = True
) -> argparse.ArgumentParser:
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
    parser.add_argument("config", type=Path, help="TOML file", nargs=None if needs_config else "?")
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


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Of commands that say what memory a run needs."""
    parser.add_argument(
        "--reserve-gib",
        type=finite,
        default=5.0,
        metavar="G",
        help="left for what is not counted: CUDA's context, NCCL's buffers, fragmentation, "
        "temporaries of kernels (default: 5, an assumption)",
    )
    parser.add_argument(
        "--prompt-length",
        type=positive,
        metavar="N",
        help="tokens of the longest (default: data.max_prompt_length)",
    )
    parser.add_argument(
        "--teacher-prompt-length",
        type=positive,
        metavar="N",
        help="tokens of the longest that a teacher reads in its place (default: as the student's)",
    )


def add_prompt_options(group: argparse._ArgumentGroup) -> None:
    """What a tool needs to write prompts as a run with the same data.* options does."""
    group.add_argument("--apply-chat-template", action="store_true")
    group.add_argument("--chat-template-kwargs", nargs="+", default=[], metavar="NAME=VALUE")
    group.add_argument("--chat-template-name", metavar="NAME")
    group.add_argument("--chat-template-file", type=Path, metavar="FILE")
    group.add_argument("--system-prompt", metavar="TEXT")
    group.add_argument("--prompt-suffix", default="", metavar="TEXT")


def prompt_options(arguments: argparse.Namespace, **more: Any) -> DataConfig:
    """The data section of that run; `more`: other options of it.

    Raises:
        ConfigError: naming the tool's option.
    """
    pairs = (text.partition("=")[::2] for text in arguments.chat_template_kwargs)
    try:
        return DataConfig(
            apply_chat_template=arguments.apply_chat_template,
            chat_template_kwargs={name: parse_value(value) for name, value in pairs},
            chat_template_name=arguments.chat_template_name,
            chat_template_file=arguments.chat_template_file,
            system_prompt=arguments.system_prompt,
            prompt_suffix=arguments.prompt_suffix,
            **more,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{problem['loc'][0].replace('_', '-')}"
        message = problem["msg"].removeprefix("Value error, ")
        if "data.apply_chat_template=false" in message:
            raise ConfigError(f"{option} needs --apply-chat-template. Give both.") from None
        raise ConfigError(f"{option}: {message}") from None


def run_command(read: Callable[[], Config], work: Callable[[Config], None]) -> int:
    """0, or 1 after an error that the user can act on, told in one message without a traceback."""
    try:
        work(read())
    except ExpectedError as error:
        return tell(error)
    except OSError as error:  # before the ranks have met; later each knows what it was doing
        told = disk_error(error, "start-up")
        if told is None:
            raise
        return tell(told)
    return 0


def tell(error: Exception) -> int:
    tell_torchrun(f"error: {error}")
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 1
