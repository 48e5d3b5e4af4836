"""A model directory's config.json: where all model shapes come from, and what may stand there.

Planner, dry run, run and conversion all read it here, so all of them take the same files, and
refuse the others in the same words.
"""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from megatron_eopd.errors import ConfigError
from megatron_eopd.models import config_keys, rope
from megatron_eopd.models.families import family_of
from megatron_eopd.models.families.base import Family
from megatron_eopd.text_files import read_json_object


def read_hf_config(hf_path: Path) -> PretrainedConfig:
    """With what the family's table of keys honours, all else as transformers has it by default.

    Raises:
        ConfigError: no such directory, no config.json, one that cannot be read, a family without
            tables, or a key with a value that is not supported.
    """
    raw = read_json(hf_path)
    try:
        family = _family(raw)
        if (problem := config_keys.problem(family.keys, raw)) is not None:
            raise ValueError(f"{problem}.")
        rope_parameters = rope.rope_parameters(raw)
        hf_config = _parse(raw, family, rope_parameters)
        rope.check_frequencies(hf_config)
    except ValueError as error:
        raise ConfigError(f"{hf_path}: config.json: {error}") from None
    return hf_config


def unknown_keys(hf_path: Path) -> str | None:
    """A warning of the keys that no table knows, or None. For a file that read_hf_config takes."""
    raw = read_json(hf_path)
    unknown = config_keys.unknown(family_of(raw["model_type"]).keys, raw)
    unknown += [
        name
        for spelling in rope.SPELLINGS
        if raw.get(spelling)
        for name in config_keys.unknown(
            config_keys.ROPE_KEYS, rope.of_all_layers(spelling, raw[spelling]), f"{spelling}."
        )
    ]
    if not unknown:
        return None
    return (
        f"{hf_path}: config.json has {', '.join(unknown)}, which nobody here knows and nothing "
        f"acts on. See to it that the model computes the same without."
    )


def read_json(hf_path: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: there is no config.json, or what is there is no JSON object.
    """
    path = Path(hf_path) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{hf_path}: no config.json there. {_instead_of_config(Path(hf_path))}")
    return read_json_object(path)


_HINTS = {
    ".metadata": "It is a Megatron checkpoint without a model's description: put config.json and "
    "the tokenizer of the Hugging Face model beside the weights.",
    "adapter_config.json": "It is an adapter alone: merge it into the model that it was made for.",
    "*.gguf": "GGUF is not read: take the safetensors that the file was made of.",
    "consolidated*.pth": "It has Meta's own format: take the repository's Hugging Face files.",
    "snapshots/*/config.json": "It is a folder of the hub's cache: give the one below snapshots/.",
    "checkpoints/*/config.json": "It is a run's folder: give one below checkpoints/.",
    "[0-9]*/DONE": "It holds the checkpoints of a run: give one of them.",
}


def _instead_of_config(path: Path) -> str:
    if not path.exists():
        return "There is no such directory. Give the path of a Hugging Face model directory."
    if path.is_file():
        return "It is a file. Give the directory that it is in."
    for pattern, hint in _HINTS.items():
        if next(path.glob(pattern), None) is not None:
            return hint
    return "Give the path of a Hugging Face model directory."


def _family(raw: dict[str, Any]) -> Family:
    """
    Raises:
        ValueError: there is none of this name, or the model is none of language.
    """
    if raw.keys() >= {"student", "teacher", "rollout"}:
        raise ValueError(
            "these are the options of a run. Give its folder hf, or one below its checkpoints."
        )
    if not isinstance(raw.get("model_type"), str):
        raise ValueError("model_type is missing. Copy the file again, or write it there.")
    family = family_of(raw["model_type"])
    if raw.get("architectures") not in (None, [], [family.architecture]):
        raise ValueError(
            f"architectures={json.dumps(raw['architectures'])}, but model_type="
            f"{raw['model_type']!r} is supported as {family.architecture} only."
        )
    return family


def _parse(raw: dict[str, Any], family: Family, rope_parameters: dict[str, Any]) -> Any:
    """
    Raises:
        ValueError: transformers refuses a value.
    """
    kept = {
        name: value
        for name, value in raw.items()
        if name in family.keys and family.keys[name].treatment == config_keys.HONOURED
    }
    for name in ("rope_theta", "rope_scaling"):
        kept.pop(name, None)
    kept["rope_parameters"] = rope_parameters
    if kept.get("head_dim") is None:  # transformers counts with what is there, and null is there
        kept.pop("head_dim", None)
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(kept)
    except Exception as error:  # its checks of types and shapes raise nearly anything
        raise ValueError(f"transformers refuses it: {' '.join(str(error).split())}") from error
