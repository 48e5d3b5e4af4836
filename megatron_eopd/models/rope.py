"""Rotary embeddings: what a config.json asks for, its frequencies, and how they turn a head.

Megatron's own rope scaling knows Llama 3's with three of its four constants fixed. Its embedding
multiplies positions by `inv_freq`, whatever that holds, so the values of transformers go there.
"""
# Shapes: S tokens of a row, A heads, D head dim, F frequencies, D / 2.

import json
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_eopd.models.config_keys import ROPE_KEYS, Raw, problem
from megatron_eopd.models.hf_weights import head_shape
from megatron_eopd.records import Rotation

SUPPORTED = ("default", "linear", "llama3", "yarn")
"""Types whose frequencies do not depend on the length of the sequence."""
SPELLINGS = ("rope_parameters", "rope_scaling")
"""transformers 5's, where `rope_theta` stands inside, and the older one."""


def rope_parameters(raw: Raw) -> dict[str, Any]:
    """All that a config.json says of rope, whatever its spelling, in transformers 5's; the same for
    every type of layer. What it leaves out is for transformers to fill in.

    Raises:
        ValueError: it contradicts itself, or asks for what is not supported.
    """
    given = {name: raw[name] for name in SPELLINGS if raw.get(name)}
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise ValueError("rope_parameters and rope_scaling differ. Remove one of them.")
    name, found = next(iter(given.items()), (SPELLINGS[0], {}))
    found = of_all_layers(name, found)
    if (why := problem(ROPE_KEYS, found, f"{name}.")) is not None:
        raise ValueError(f"{why}.")
    types = {found[key] for key in ("rope_type", "type") if key in found}
    if len(types) > 1 or not types.issubset(SUPPORTED):
        raise ValueError(
            f"{name}={json.dumps(found)} is not supported: frequencies may not depend on the "
            f"length. rope_type (or type) may be one of {', '.join(SUPPORTED)}."
        )
    outside = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    for key, value in outside.items():
        if found.get(key, value) != value:
            raise ValueError(
                f"{key}={json.dumps(value)} is not {name}.{key}={json.dumps(found[key])}. Remove "
                f"one of them."
            )
    found = {key: value for key, value in found.items() if key != "type"}
    return found | outside | {"rope_type": next(iter(types), "default")}


def of_all_layers(name: str, found: Any) -> dict[str, Any]:
    """What the key `name` holds, without the level of layer types, if it has one.

    Raises:
        ValueError: it is no object, or has another rope for some layers.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{name}={json.dumps(found)} is no object. Copy the file again.")
    by_layer = {key: value for key, value in found.items() if key.endswith("_attention")}
    if not by_layer:
        return found
    first, *others = by_layer.values()
    if len(by_layer) < len(found) or any(other != first for other in others):
        raise ValueError(
            f"{name}={json.dumps(found)} is not supported: all layers must have the same rope."
        )
    return of_all_layers(f"{name}.{next(iter(by_layer))}", first)


def check_frequencies(hf_config: PretrainedConfig) -> None:
    """
    Raises:
        ValueError: they cannot be computed from the numbers in config.json.
    """
    try:
        frequencies, scaling = _rope(hf_config)
        is_sound = bool((frequencies.isfinite() & (frequencies > 0)).all()) and scaling > 0
    except (KeyError, TypeError, ValueError, ArithmeticError):  # missing, text, or out of range
        is_sound = False
    if not is_sound:
        raise ValueError(
            f"rope_parameters={json.dumps(hf_config.rope_parameters)}: no frequencies follow from "
            f"these numbers. Copy the file again."
        )


def rotation_of(
    positions_S: torch.Tensor, frequencies_F: torch.Tensor, dtype: torch.dtype
) -> Rotation:
    """Angles are float32 whatever the model's dtype: bfloat16 counts positions to 256."""
    angles_S1F = (positions_S.float().unsqueeze(1) * frequencies_F).unsqueeze(1)
    return Rotation(angles_S1F.cos().to(dtype), angles_S1F.sin().to(dtype))


def rotate(x_SAD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turns the pairs (x[i], x[i + D/2]), as Megatron does where heads are not interleaved: the
    same bits."""
    first, second = x_SAD.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def inverse_frequencies(hf_config: PretrainedConfig) -> torch.Tensor:
    """float32 [F]."""
    return _rope(hf_config)[0]


def attention_scaling(hf_config: PretrainedConfig) -> float:
    """Factor on queries and on keys alike (YaRN's), so its square belongs on the scores."""
    return _rope(hf_config)[1]


def _rope(hf_config: PretrainedConfig) -> tuple[torch.Tensor, float]:
    parameters = hf_config.rope_parameters
    if parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](hf_config, torch.device("cpu"))
    head_dim = head_shape(hf_config).head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0
