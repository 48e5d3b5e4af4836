"""What a weight sync carries, agreed once at start-up and never negotiated again.

The trainer makes a Manifest from its parallel layout (models.export), the engine is told it when
its process has started, and both compare its digest before every update.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorSpec:
    """One tensor under its Hugging Face name, whole: no tensor-parallel shard is left in it."""

    name: str
    dtype: str
    """As torch spells it without the prefix, e.g. "bfloat16"."""
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


Bucket = tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Manifest:
    """Buckets of every pipeline stage, in the order in which they are sent."""

    stages: tuple[tuple[Bucket, ...], ...]

    @property
    def names(self) -> list[str]:
        return [spec.name for stage in self.stages for bucket in stage for spec in bucket]

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for stage in self.stages for bucket in stage for s in bucket)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(
            [
                [[[s.name, s.dtype, list(s.shape)] for s in b] for b in stage]
                for stage in self.stages
            ]
        )

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        return cls(
            tuple(
                tuple(tuple(TensorSpec(n, d, tuple(shape)) for n, d, shape in b) for b in stage)
                for stage in json.loads(text)
            )
        )
