"""Under which keys a checkpoint stores what the model asks for.

Megatron-Core's own model asks in one way: layers (and experts) stacked along axes of their own, and
norms under TransformerEngine's names. Other settings of Megatron-LM, and torch's own checkpoint of
a state dict, have a key for every layer or expert, the two halves of fc1 apart, or all keys under
`model.`. All of them hold the same numbers in the same order, so a piece of a tensor only has to
be asked for by another name, and with fewer axes.
"""

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

from megatron.core.dist_checkpointing import ShardedTensor

EMBEDDING = "embedding.word_embeddings.weight"
_LAYERS = "decoder.layers."
_EXPERTS = "mlp.experts.experts."
# TransformerEngine fuses a norm into the linear layer behind it; a dense MLP's or attention's.
_NORMS = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)


OF_TEACHERS = "teachers."
"""In front of keys of a run's checkpoint that are no part of its student."""


@dataclass(frozen=True)
class KeyStyle:
    """What all keys of a checkpoint have in common."""

    prefix: str
    by_layer: bool
    """A key for each layer, even though all layers are alike."""

    def ask(self, piece: ShardedTensor, keys: Container[str]) -> ShardedTensor:
        """The piece under the one of `keys` that has it; if none has, under the likeliest."""
        candidates = [replace(p, key=self.prefix + p.key) for p in self._spellings(piece)]
        return next((p for p in candidates if p.key in keys), candidates[0])

    def is_weight(self, key: str) -> bool:
        """Whether a tensor of the checkpoint belongs to the model; not so the state of an
        optimizer, teachers of a run, and what TransformerEngine keeps of float8."""
        own = key.removeprefix(self.prefix)
        other = not key.startswith(self.prefix) or own.startswith(
            ("optimizer.", "chained_", OF_TEACHERS)
        )
        return not other and "_extra_state" not in own

    def _spellings(self, piece: ShardedTensor) -> Iterator[ShardedTensor]:
        if self.by_layer and re.match(rf"{re.escape(_LAYERS)}\D", piece.key):
            layer = f"{_LAYERS}{piece.global_offset[0]}."
            piece = _without_axis(piece, 0, layer + piece.key.removeprefix(_LAYERS))
        for expert in (piece, *_single_experts(piece)):
            yield from (expert, *_halves(expert))
        for one, other in (*_NORMS, *(pair[::-1] for pair in _NORMS)):
            if piece.key.endswith(one):
                yield replace(piece, key=piece.key.removesuffix(one) + other)


def style_of(keys: Iterable[str]) -> KeyStyle:
    """Of the keys of a checkpoint's tensors."""
    keys = list(keys)
    pattern = re.compile(rf"((?:model\.|module\.)*){re.escape(EMBEDDING)}")
    prefix = next((match[1] for key in keys if (match := pattern.fullmatch(key))), "")
    # Of a model with experts in some layers, Megatron-Core itself asks by layer.
    one_layer = re.compile(rf"{re.escape(prefix + _LAYERS)}\d+\.")
    return KeyStyle(prefix, any(one_layer.match(key) for key in keys))


def _single_experts(piece: ShardedTensor) -> Iterator[ShardedTensor]:
    """One expert of the stacked ones: by Megatron-Core's name, and by those of its two modules."""
    if _EXPERTS not in piece.key or not piece.prepend_axis_num:
        return
    axis = piece.prepend_axis_num - 1
    expert = piece.global_offset[axis]
    before, _, rest = piece.key.partition(_EXPERTS)
    module, _, kind = rest.partition(".")
    for key in (
        f"{_EXPERTS}{expert}.{rest}",
        f"mlp.experts.local_experts.{expert}.{rest}",
        f"mlp.experts.{module}.{kind}{expert}",
    ):
        yield _without_axis(piece, axis, before + key)


def _halves(piece: ShardedTensor) -> Iterator[ShardedTensor]:
    """The gate's or up projection's part of fc1, as a tensor of its own."""
    if not re.search(r"linear_fc1\.(weight|bias)\d*$", piece.key):
        return
    axis = piece.prepend_axis_num
    rows, offset = piece.global_shape[axis] // 2, piece.global_offset[axis]

    def at_axis(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:axis], value, *values[axis + 1 :])

    yield replace(
        piece,
        key=piece.key + ("_w" if offset < rows else "_v"),
        global_shape=at_axis(piece.global_shape, rows),
        global_offset=at_axis(piece.global_offset, offset % rows),
        axis_fragmentations=at_axis(
            piece.axis_fragmentations, max(piece.axis_fragmentations[axis] // 2, 1)
        ),
    )


def _without_axis(piece: ShardedTensor, axis: int, key: str) -> ShardedTensor:
    def rest(values: tuple[int, ...]) -> tuple[int, ...]:
        return (*values[:axis], *values[axis + 1 :])

    return replace(
        piece,
        key=key,
        global_shape=rest(piece.global_shape),
        global_offset=rest(piece.global_offset),
        axis_fragmentations=rest(piece.axis_fragmentations),
        prepend_axis_num=piece.prepend_axis_num - 1,
    )
