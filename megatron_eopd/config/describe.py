"""The options in words: for --help, for what is wrong with one, for what a resumed run changed."""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import ValidationError

from megatron_eopd.config.config import Config
from megatron_eopd.config.section import Section, words_of


class Option(NamedTuple):
    name: str
    """section.key"""
    default: str
    """As it is written on the command line; or `required`, or `unset` where none is a value."""
    values: tuple[str, ...]
    """All that it takes, where these are words."""
    text: str
    """Its docstring."""


def describe_options(section: type[Section] = Config, prefix: str = "") -> Iterator[Option]:
    """Every option, in the order of the files. `teachers` stands for itself: each has the options
    of `[teacher]`."""
    for name, field in section.model_fields.items():
        types = (field.annotation, *get_args(field.annotation))
        nested = [t for t in types if isinstance(t, type) and issubclass(t, Section)]
        is_table = get_origin(field.annotation) is dict
        if not nested or is_table or field.default is None:
            values = tuple(words_of(field.annotation)) if not is_table else ()
            default = "required" if field.is_required() else _written(field.default, values)
            yield Option(f"{prefix}{name}", default, values, field.description or "")
        if nested and not is_table:
            yield from describe_options(nested[0], f"{prefix}{name}.")


def _written(default: Any, values: tuple[str, ...]) -> str:
    if default is None:  # none unsets an option, unless it is one of its own words
        return "unset" if "none" in values else "none"
    return default if isinstance(default, str) and default else json.dumps(default, default=str)


def explain(error: ValidationError, toml_path: Path) -> str:
    lines = [f"{toml_path}: the configuration is not valid."]
    options = {option.name for option in describe_options()}
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {name}: unknown option. {_suggest(name)}")
        elif problem["type"] == "missing":
            lines.append(f"  {name}: missing. Set it in the file or as {name}=…")
        elif name and name not in options and isinstance(problem["input"], dict):
            # A section, whose options contradict each other.
            lines.append(f"  {name}: {message}")
        elif name:
            lines.append(f"  {name}={problem['input']!r}: {message}")
        else:
            lines.append(f"  {message}")
    return "\n".join(lines)


def _suggest(unknown: str) -> str:
    # Any teacher has the options of [teacher].
    asked = re.sub(r"^teachers\.[^.]+\.", "teacher.", unknown)
    known = [option.name for option in describe_options()]
    close = difflib.get_close_matches(asked, known, n=1)
    section = asked.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == section] or known
    if not section:
        siblings = list(Config.model_fields)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"{hint}Known here: {', '.join(siblings)}."


def changed_options(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`section.key: old → new` of every option that differs between two resolved configurations."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_options(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {before} → {after}")
    return changes
