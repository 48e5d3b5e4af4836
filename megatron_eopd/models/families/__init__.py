"""One weight table per model family, found by the `model_type` of the HF config.json."""

from megatron_eopd.models.families import llama, qwen2, qwen3, qwen3_moe
from megatron_eopd.models.families.base import Family

FAMILIES: dict[str, Family] = {
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen2": qwen2.FAMILY,
    "llama": llama.FAMILY,
}


def family_of(model_type: str) -> Family:
    """
    Raises:
        ValueError: no table for this family.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json says model_type={model_type!r}, which is not supported. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
