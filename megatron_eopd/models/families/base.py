"""How one Megatron parameter is made of Hugging Face tensors, and how it is split over ranks.

A family is a table of Mapping rows. Loading, exporting and the weight sync all read the same row,
so a weight that comes in right goes out right.
"""

from dataclasses import dataclass
from enum import Enum


class Split(Enum):
    """How a whole HF tensor (or several) becomes one tensor-parallel shard."""

    REPLICATED = "every rank holds all of it"
    ROW = "columns of the weight (input features), in equal parts"
    VOCAB = "rows, after padding the vocabulary"
    QKV = "query, key, value: by query group, each group's queries then its key and value"
    GATE_UP = "gate and up projection: each in equal parts, gate's part before up's"

    @property
    def dim(self) -> int | None:
        """The dim of the Megatron parameter that is cut; None where every rank holds all."""
        return {Split.REPLICATED: None, Split.ROW: 1}.get(self, 0)


@dataclass(frozen=True)
class Mapping:
    """One row of a family's table. `{i}` stands for the layer, counted over all stages."""

    megatron: tuple[str, ...]
    """Names of the parameter: on the local specification first, then on TransformerEngine's,
    which fuses some norms into the linear layer behind them."""
    hf: tuple[str, ...]
    split: Split


@dataclass(frozen=True)
class Family:
    architecture: str
    """As HF's config.json lists it under `architectures`."""
    qk_layernorm: bool
    mappings: tuple[Mapping, ...]
