"""What memory depends on, of each model. In: config.json files. Out: integers.

No weight file is read: the tensors that each model must have are counted by the family's own table
of how weights are cut.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from transformers import PretrainedConfig

from megatron_eopd.config import Config
from megatron_eopd.models.families import family_of
from megatron_eopd.models.families.base import Split
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_weights import HeadShape, head_shape, num_experts
from megatron_eopd.models.tensor_shapes import tensor_shapes
from megatron_eopd.parallel.layout import Layout


@dataclass(frozen=True)
class LayerWeights:
    """Parameters of a layer, by how they are cut. It stands for a kind of layer: those of a model
    that are not alike differ in what is an expert's."""

    replicated: int
    """On every tensor-parallel rank: norms, routers."""
    split: int
    """Over the tensor-parallel ranks."""
    experts: int
    """Over expert-parallel and expert-tensor-parallel ranks."""


# eq=False: hashed by identity. Hashing a hundred layers would be most of a search's work.
@dataclass(frozen=True, eq=False)
class ModelShape:
    hf_config: PretrainedConfig
    hidden_size: int
    intermediate_size: int
    heads: HeadShape
    has_qk_norms: bool
    vocab_size: int
    is_tied: bool
    """The LM head is the embedding."""
    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    layers: tuple[LayerWeights, ...]

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> "ModelShape":
        has_experts = num_experts(hf_config) > 0
        rows = family_of(hf_config.model_type).mappings
        return cls(
            hf_config=hf_config,
            hidden_size=hf_config.hidden_size,
            intermediate_size=hf_config.intermediate_size,
            heads=head_shape(hf_config),
            has_qk_norms=any("q_norm" in row.hf[0] for row in rows),
            vocab_size=hf_config.vocab_size,
            is_tied=hf_config.tie_word_embeddings,
            num_experts=num_experts(hf_config),
            experts_per_token=hf_config.num_experts_per_tok if has_experts else 0,
            expert_intermediate_size=hf_config.moe_intermediate_size if has_experts else 0,
            layers=_layer_weights(hf_config),
        )

    @property
    def num_parameters(self) -> int:
        """Of the whole model, with its own vocabulary."""
        layers = sum(w.replicated + w.split + w.experts for w in self.layers)
        embeddings = (1 if self.is_tied else 2) * self.vocab_size * self.hidden_size
        return layers + embeddings + self.hidden_size


def _layer_weights(hf_config: PretrainedConfig) -> tuple[LayerWeights, ...]:
    rows = {name: row for row in family_of(hf_config.model_type).mappings for name in row.hf}
    counts: list[Counter] = [Counter() for _ in range(hf_config.num_hidden_layers)]
    for name, shape in tensor_shapes(hf_config).items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is None:  # embedding, last norm, LM head
            continue
        pattern = name.replace(layer[0], ".layers.{i}.", 1)
        row = rows[re.sub(r"\.experts\.\d+\.", ".experts.{e}.", pattern)]
        kind = "replicated" if row.split is Split.REPLICATED else "split"
        counts[int(layer[1])]["experts" if row.is_expert else kind] += math.prod(shape)
    return tuple(LayerWeights(c["replicated"], c["split"], c["experts"]) for c in counts)


def layers_of_stage(shape: ModelShape, layout: Layout, stage: int) -> Mapping[LayerWeights, int]:
    """Kind of layer → how many of it a pipeline stage has, in all its chunks."""
    return _kinds_by_stage(shape, layout.stages_of_layers(len(shape.layers)))[stage]


@cache
def _kinds_by_stage(
    shape: ModelShape, stages: tuple[int, ...]
) -> Mapping[int, Mapping[LayerWeights, int]]:
    """`stages`: of every layer."""
    kinds: defaultdict[int, Counter[LayerWeights]] = defaultdict(Counter)
    for stage, weights in zip(stages, shape.layers, strict=True):
        kinds[stage][weights] += 1
    return dict(kinds)


@dataclass(frozen=True)
class Models:
    """Student and teachers of a run; a teacher by the name of its section."""

    student: ModelShape
    teachers: dict[str, ModelShape]

    @classmethod
    def of(cls, config: Config) -> "Models":
        """
        Raises:
            ConfigError: a model's directory has no config.json, or one that no run takes.
        """
        teachers = config.all_teachers
        paths = {config.student.hf_path, *(teacher.hf_path for teacher in teachers.values())}
        shapes = {path: ModelShape.of(read_hf_config(path)) for path in paths}
        return cls(
            shapes[config.student.hf_path],
            {section: shapes[teacher.hf_path] for section, teacher in teachers.items()},
        )
