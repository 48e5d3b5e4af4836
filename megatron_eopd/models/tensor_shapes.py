"""Every tensor of a model as its files have it. In: config.json. Out: names and shapes.

transformers builds the model once, without memory: what it needs is what must be there.
"""

import re
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

Shape = tuple[int, ...]
_FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)")


def tensor_shapes(hf_config: PretrainedConfig) -> dict[str, Shape]:
    """A tied LM head is not among them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    found = {
        name: shape
        for parameter_name, parameter in model.named_parameters()
        for name, shape in _in_files(parameter_name, tuple(parameter.shape))
    }
    if hf_config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    return found


def _in_files(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """transformers keeps the experts of a layer in one tensor; the files have them one by one."""
    fused = _FUSED_EXPERTS.fullmatch(name)
    if fused is None:
        yield name, shape
        return
    prefix, projection = fused.groups()
    count, rows, columns = shape
    for expert in range(count):
        if projection == "down_proj":
            yield f"{prefix}{expert}.down_proj.weight", (rows, columns)
        else:
            yield f"{prefix}{expert}.gate_proj.weight", (rows // 2, columns)
            yield f"{prefix}{expert}.up_proj.weight", (rows // 2, columns)
