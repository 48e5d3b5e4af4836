"""Safetensors files that are planned before they are written, read back by safetensors itself."""

import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from megatron_eopd.models.hf_files import (
    HFCheckpoint,
    PlannedFile,
    SafetensorsWriter,
    listing,
    name_files,
    plan_files,
)
from megatron_eopd.weight_sync.manifest import TensorSpec

SHAPES = [(), (1,), (7,), (0,), (0, 4), (3, 5), (2, 3, 5)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_planned_header_is_what_safetensors_reads(dtype):
    """Any shape, and names that JSON has to escape."""
    specs = tuple(TensorSpec(f'"ä" {i}', dtype, shape) for i, shape in enumerate(SHAPES))
    planned = PlannedFile("model.safetensors", specs)
    data = bytes(range(1, 1 + planned.num_bytes - len(planned.header)))
    tensors = load(planned.header + data)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {s.name: s.shape for s in specs}
    flat = [tensors[s.name].reshape(-1).view(torch.uint8) for s in specs if math.prod(s.shape)]
    assert bytes(torch.cat(flat).tolist()) == data, "in the order of the plan, without gaps"


def test_a_written_file_is_the_planned_one(tmp_path):
    """To the byte; views and casts included; and it has no name until it is complete."""
    wide = torch.randn(6, 8)
    tensors = [wide[:, 2:5], wide.T, wide[0], wide.chunk(2)[1].bfloat16()]
    specs = tuple(TensorSpec(f"t{i}", "float16", tuple(t.shape)) for i, t in enumerate(tensors))
    planned = PlannedFile("model.safetensors", specs)
    with SafetensorsWriter(tmp_path, planned) as writer:
        for tensor in tensors:
            writer.write(tensor)
        assert not (tmp_path / planned.name).exists()
    assert (tmp_path / planned.name).stat().st_size == planned.num_bytes
    found = load_file(tmp_path / planned.name)
    for spec, tensor in zip(specs, tensors, strict=True):
        assert torch.equal(found[spec.name], tensor.half())
    assert [path.name for path in tmp_path.iterdir()] == [planned.name]


def test_an_interrupted_file_never_gets_its_name(tmp_path):
    planned = PlannedFile("model.safetensors", (TensorSpec("t", "float32", (4,)),))
    with pytest.raises(RuntimeError, match="stop"), SafetensorsWriter(tmp_path, planned) as writer:
        writer.write(torch.zeros(4))
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.partial"]


def test_plans_keep_order_and_never_cut_a_group():
    """Of 200 random lists of groups: a file exceeds the size only when it is one group, and the
    first group of a file would not have fitted into the file before."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    for _ in range(200):
        groups = [
            [TensorSpec(f"{g}-{i}", "bfloat16", (draw(9),)) for i in range(draw(4))]
            for g in range(draw(12))
        ]
        limit = draw(60)
        files = plan_files(groups, limit)
        assert [s for file in files for s in file] == [s for group in groups for s in group]
        sizes = {group[0].name: sum(s.num_bytes for s in group) for group in groups}
        filled = [[sizes[s.name] for s in file if s.name.endswith("-0")] for file in files]
        assert sum(map(len, filled)) == len(groups) and all(filled), "no file begins inside a group"
        for file in filled:
            assert sum(file) <= limit or len(file) == 1
        for before, after in pairwise(filled):
            assert sum(before) + after[0] > limit


def test_one_file_is_named_as_transformers_names_it():
    spec = (TensorSpec("t", "float32", (1,)),)
    assert [file.name for file in name_files([spec])] == ["model.safetensors"]
    assert [file.name for file in name_files([spec, spec])] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_problems_of_many_layers_share_a_line():
    """Exactly those that there are: {0-1} × {0,2} would be four, and here are three."""
    layers = [f"model.layers.{i}.self_attn.q_norm.weight: missing" for i in (10, 0, 1, 2)]
    experts = [
        f"model.layers.{i}.mlp.experts.{e}.up_proj.weight: missing"
        for i, e in ((0, 0), (0, 2), (1, 2), (3, 2))
    ]
    assert listing([*layers, "lm_head.weight: missing", *experts]).splitlines() == [
        "  model.layers.{0-2,10}.self_attn.q_norm.weight: missing",
        "  lm_head.weight: missing",
        "  model.layers.0.mlp.experts.{0,2}.up_proj.weight: missing",
        "  model.layers.{1,3}.mlp.experts.2.up_proj.weight: missing",
    ]


def test_types_are_counted_of_the_weights_asked_for(tmp_path):
    """A buffer that older Llama files carry along has no say in what the model's type is."""
    tensors = {"a": torch.zeros(2).bfloat16(), "rotary_emb.inv_freq": torch.zeros(2).double()}
    save_file(tensors, tmp_path / "model.safetensors")
    with HFCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.count_dtypes(["a"]) == {torch.bfloat16: 1}
