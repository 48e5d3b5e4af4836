"""A model directory's config.json, as transformers reads it: where all model shapes come from."""

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from megatron_eopd.errors import ConfigError
from megatron_eopd.models.families import family_of


def read_hf_config(hf_path: Path) -> PretrainedConfig:
    """
    Raises:
        ConfigError: no such directory, no config.json, or a model family without a weight table.
    """
    if not (Path(hf_path) / "config.json").is_file():
        raise ConfigError(
            f"{hf_path}: no config.json there. Give the path of a Hugging Face model directory."
        )
    try:
        hf_config = AutoConfig.from_pretrained(hf_path)
        family = family_of(hf_config.model_type)
    except (ValueError, OSError) as error:  # OSError: config.json is no JSON
        raise ConfigError(f"{hf_path}: {error}") from None
    if family.architecture not in (hf_config.architectures or [family.architecture]):
        raise ConfigError(
            f"{hf_path}: config.json lists architectures={hf_config.architectures}, but "
            f"model_type={hf_config.model_type!r} is supported as {family.architecture} only."
        )
    return hf_config
