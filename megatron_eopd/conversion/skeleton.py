"""What a conversion walks over: every parameter of the model, uncut, without its memory.

In: config.json. Out: parameters in the model's order, each with its Hugging Face names and its
place in a Megatron checkpoint. Every rank makes the same list and takes its part of the files.
"""

from dataclasses import dataclass

from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject
from transformers import PretrainedConfig

from megatron_eopd.models.build import build_skeleton
from megatron_eopd.models.hf_weights import (
    HeadShape,
    Weight,
    head_shape,
    hf_shapes,
    weights_of,
)
from megatron_eopd.models.mcore_writer import serialised
from megatron_eopd.parallel.init import ParallelContext

WHOLE = 0, 1
"""(rank, size) of a tensor-parallel group that cuts nothing."""


@dataclass(frozen=True)
class Group:
    """One Megatron parameter, whole, and the HF tensors it is made of."""

    name: str
    weight: Weight
    shape: tuple[int, ...]
    item: ShardedBase
    hf_shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Skeleton:
    groups: tuple[Group, ...]
    heads: HeadShape
    vocab_size: int
    objects: dict[str, bytes]
    """What Megatron's own checkpoint has beside tensors, by key, as torch.save writes it."""


def make_skeleton(hf_config: PretrainedConfig, context: ParallelContext) -> Skeleton:
    """context: one in which nothing is cut (tensor, pipeline and expert-parallel size 1)."""
    model = build_skeleton(hf_config, context)
    weights = weights_of(model, hf_config)
    heads, vocab = head_shape(hf_config), hf_config.vocab_size
    state = model.sharded_state_dict()
    groups = []
    for name, parameter in model.named_parameters():
        weight = weights[name]
        shapes = hf_shapes(weight.row.split, parameter, 1, heads, vocab)
        named = dict(zip(weight.hf_names(ep_rank=0), shapes, strict=True))
        groups.append(Group(name, weight, tuple(parameter.shape), state[name], named))
    objects = {
        item.unique_key: serialised([item.data])
        for item in state.values()
        if isinstance(item, ShardedObject)
    }
    return Skeleton(tuple(groups), heads, vocab, objects)
