"""A TOML file and `section.key=value` overrides into a Config."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_eopd.config.config import Config
from megatron_eopd.config.data import BUILT_IN_TASKS
from megatron_eopd.config.describe import explain
from megatron_eopd.config.evaluation import task_parts
from megatron_eopd.errors import CheckpointError, ConfigError
from megatron_eopd.model_paths import resolve_model


def load_config(toml_path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides on top, in order.

    A relative path in the file means the file's own directory if it exists there, else the working
    directory, as it always does on the command line and for `run_dir`. A model's path that is a
    root of Megatron-LM's means the checkpoint that its tracker names.

    Raises:
        ConfigError: naming the option, the value, and what would be right.
    """
    try:
        tree = tomllib.loads(Path(toml_path).read_text("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{toml_path}: no such file. Give the path of a TOML configuration."
        ) from None
    except OSError as error:  # a directory, or no permission
        raise ConfigError(
            f"{toml_path}: cannot be read ({error.strerror}). Give the path of a TOML file."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{toml_path}: not UTF-8 text ({error}). Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{toml_path}: not valid TOML: {error}") from None
    missing = _resolve_paths(tree, Path(toml_path).parent)
    for override in overrides:
        missing.pop(override.partition("=")[0], None)  # the command line names another
    config = config_of(tree, overrides, toml_path)
    config._missing_inputs = tuple(missing.values())
    return config


def config_of(
    tree: dict[str, Any], overrides: Sequence[str] = (), source: Path | str = "command line"
) -> Config:
    """Of nested tables, with the overrides on top. `source`: for messages.

    Raises:
        ConfigError: as load_config.
    """
    for override in overrides:
        _apply_override(tree, override)
    _resolve_models(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, source)) from None


def _resolve_paths(tree: dict[str, Any], directory: Path) -> dict[str, str]:
    """Point what the file names, and has beside it, there. Returns what is to be said of each
    option whose relative path exists neither there nor in the working directory."""
    missing: dict[str, str] = {}
    _resolve_task_files(tree, directory)
    for option in _input_paths(tree):
        where, _, key = option.rpartition(".")
        section = _section(tree, where)
        value = section.get(key)
        if not isinstance(value, str) or value in ("", "none", *BUILT_IN_TASKS):
            continue
        section[key], said = _resolve(option, value, directory)
        missing |= said
    return missing


def _resolve(option: str, value: str, directory: Path) -> tuple[str, dict[str, str]]:
    """The path, and what is to be said of it."""
    beside = directory / value  # an absolute value stays what it is
    if beside.exists():
        return str(beside), {}
    if Path(value).is_absolute() or Path(value).exists():
        return value, {}
    said = (
        f"{option}={value}: no such file or directory. Looked for {beside.absolute()} and "
        f"{Path(value).absolute()}."
    )
    return value, {option: said}


def _resolve_task_files(tree: dict[str, Any], directory: Path) -> None:
    """Those of evaluation.tasks; one that is nowhere may be on the hub."""
    section = _section(tree, "evaluation")
    tasks = section.get("tasks")
    if isinstance(tasks, list):
        section["tasks"] = [_with_path(task, directory) for task in tasks]


def _with_path(task: Any, directory: Path) -> Any:
    word, source = task_parts(task) if isinstance(task, str) else (task, None)
    return f"{word}={_resolve('', source, directory)[0]}" if source else task


def _resolve_models(tree: dict[str, Any]) -> None:
    for option in _input_paths(tree):
        where, _, key = option.rpartition(".")
        value = _section(tree, where).get(key)
        if key == "hf_path" and isinstance(value, str):
            try:
                _section(tree, where)[key] = str(resolve_model(Path(value)))
            except CheckpointError as error:
                raise ConfigError(f"{option}: {error}") from None


def _input_paths(tree: dict[str, Any]) -> list[str]:
    """The options that name something to read."""
    teachers = tree.get("teachers")
    names = list(teachers) if isinstance(teachers, dict) else []
    models = ["student", "teacher", *(f"teachers.{name}" for name in names)]
    files = ["data.prompts", "data.chat_template_file", "rollout.replay", "checkpoint.load"]
    files.append("evaluation.data_dir")
    files += [f"{model}.prompt.chat_template_file" for model in models[1:]]
    return [f"{model}.{key}" for model in models for key in ("hf_path", "tokenizer")] + files


def _section(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """The table of this name; an empty one where there is none, or something else."""
    for name in where.split("."):
        tree = tree.get(name)
        if not isinstance(tree, dict):
            return {}
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r} has no '='. Write section.key=value.")
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section!r} is an option, not a section.")
    tree[key] = parse_value(text)


def parse_value(text: str) -> Any:
    """TOML's own reading of the value; a bare word is a string, so paths need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
