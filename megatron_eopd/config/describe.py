"""The options in words: for --help, for what is wrong with one, for what a resumed run changed."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from megatron_eopd.config.config import Config
from megatron_eopd.config.models import TeacherConfig
from megatron_eopd.config.section import Section


def describe_options(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple]:
    """(dotted name, default as TOML-like text, docstring) of every option, in file order."""
    for name, field in section.model_fields.items():
        sections = [t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)]
        if sections and field.annotation is not dict[str, TeacherConfig]:
            yield from describe_options(sections[0], f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.default, default=str)
        yield f"{prefix}{name}", default, field.description or ""


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def explain(error: ValidationError, toml_path: Path) -> str:
    lines = [f"{toml_path}: the configuration is not valid."]
    options = {option for option, _, _ in describe_options()}
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
    known = [name for name, _, _ in describe_options()]
    close = difflib.get_close_matches(unknown, known, n=1)
    section = unknown.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == section] or known
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
