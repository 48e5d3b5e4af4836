"""Weight tables and the choice of the layer specification, TransformerEngine's included."""

import re

import pytest
import torch
from transformers import AutoConfig

from megatron_eopd.config import ModelConfig
from megatron_eopd.errors import ConfigError
from megatron_eopd.models import fit, hf_weights, megatron_config
from megatron_eopd.models.families import FAMILIES
from megatron_eopd.models.families.base import Split
from megatron_eopd.models.hf_weights import HeadShape, fill_shard, join, weights_of
from megatron_eopd.parallel.layout import Layout

QKV_ROWS = ((1, 4), (2, 2), (3, 2))


def skeleton(names: list[str], first_layer: int) -> torch.nn.Module:
    """A module that has parameters of these names and nothing else."""
    root = torch.nn.Module()
    root.decoder = torch.nn.Module()
    root.decoder.layers = torch.nn.ModuleList([torch.nn.Module()])
    root.decoder.layers[0].layer_number = first_layer + 1
    for name in names:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(1)))
    return root


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("spec", [0, -1], ids=["local", "transformer_engine"])
def test_both_specifications_find_every_weight(model_type, spec):
    """TransformerEngine fuses the norms into the linear layers and the experts into one module; the
    HF names are the same, and layers and experts count over all ranks."""
    rows = FAMILIES[model_type].mappings
    names = {row.megatron[spec].format(i=0, e=e): row for row in rows for e in (0, 1)}
    config = AutoConfig.for_model(model_type, tie_word_embeddings=False)
    weights = weights_of(skeleton(list(names), first_layer=3), config)
    assert {name: weight.row for name, weight in weights.items()} == names
    found = sorted(hf for weight in weights.values() for hf in weight.hf_names(ep_rank=2))
    expected = {hf.format(i=3, e=4 + e) for row in rows for hf in row.hf for e in (0, 1)}
    assert found == sorted(expected)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("split", list(Split), ids=lambda s: s.name)
@pytest.mark.parametrize("bias", [False, True])
def test_join_undoes_fill_shard(split, bias, tp, monkeypatch):
    """Also when rows are copied a few at a time, and in another order of ranks than the first."""
    bias = bias and split is not Split.ROW  # a row-parallel layer's bias is replicated
    monkeypatch.setattr(hf_weights, "READ_BYTES", 3 * 8 * 4)
    heads = HeadShape(num_heads=8, num_groups=4, head_dim=3)
    rows = {Split.QKV: [24, 12, 12], Split.GATE_UP: [16, 16], Split.VOCAB: [17]}.get(split, [20])
    wholes = [torch.randn((n,) if bias else (n, 8)) for n in rows]
    shape = [sum(rows), 8][: 1 if bias else 2]
    if split is Split.VOCAB:
        shape[0] = 20
    if split.dim is not None:
        shape[split.dim] //= tp
    shards = [torch.full(shape, torch.nan) for _ in range(tp)]
    for rank, out in enumerate(shards):
        fill_shard(out, split, wholes, rank, tp, heads)
    for whole, again in zip(wholes, join(split, shards, heads, vocab=17), strict=True):
        assert torch.equal(whole, again)


def test_queries_and_keys_lie_group_by_group():
    """Megatron's order, said once without the code under test: 4 heads in 2 groups, 1 wide."""
    query, key, value = (torch.tensor([[10.0 * k + i] for i in range(n)]) for k, n in QKV_ROWS)
    out = torch.empty(8, 1)
    fill_shard(out, Split.QKV, [query, key, value], 0, 1, HeadShape(4, 2, 1))
    assert out[:, 0].tolist() == [10, 11, 20, 30, 12, 13, 21, 31]


@pytest.mark.parametrize(
    "sizes,message",
    [
        (
            {"tp": 2, "sequence_parallel": True, "ep": 3},
            "does not divide the student's num_experts",
        ),
        ({"tp": 2}, "needs parallel.sequence_parallel=true"),
        (
            {"tp": 1, "expert_tp": 5},
            "moe_intermediate_size=768. It must come to one of [1, 2, 3, 4]",
        ),
    ],
)
def test_layouts_that_experts_cannot_have(sizes, message):
    layout = Layout(**({"pp": 1, "dp": 4, "rank": 0} | sizes))
    with pytest.raises(ConfigError, match=re.escape(message)):
        fit.check_divides(AutoConfig.for_model("qwen3_moe"), layout, "student")


def test_expert_sizes_without_experts():
    layout = Layout(tp=1, pp=1, dp=2, rank=0, ep=2)
    with pytest.raises(ConfigError, match=r"has no experts\. Set both to 1"):
        fit.check_divides(AutoConfig.for_model("qwen3"), layout, "teacher")


def test_a_head_size_that_vllm_does_not_read():
    config = AutoConfig.for_model("qwen2", hidden_size=64, num_attention_heads=4, head_dim=32)
    with pytest.raises(ConfigError, match=r"head_dim=32, .* takes hidden_size .*=16"):
        fit.check_vllm(config)
    for model_type, head_dim in (("qwen2", 16), ("qwen2", None), ("qwen3", 32)):
        fit.check_vllm(
            AutoConfig.for_model(
                model_type, hidden_size=64, num_attention_heads=4, head_dim=head_dim
            )
        )


def test_specification_follows_what_is_installed(monkeypatch):
    def with_engine(found: bool, implementation: str) -> bool:
        spec = object() if found else None
        monkeypatch.setattr(megatron_config.importlib.util, "find_spec", lambda name: spec)
        return megatron_config.uses_transformer_engine(ModelConfig(transformer_impl=implementation))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert with_engine(True, "auto") and with_engine(True, "transformer_engine")
    assert not with_engine(True, "local") and not with_engine(False, "auto")
    with pytest.raises(ConfigError, match=r"set model\.transformer_impl=local"):
        with_engine(False, "transformer_engine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not with_engine(True, "auto"), "without a GPU its layers cannot run"
