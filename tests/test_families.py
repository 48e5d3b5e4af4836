"""Weight tables and the choice of the layer specification, TransformerEngine's included."""

import pytest
import torch

from megatron_eopd.config import ConfigError, ModelConfig
from megatron_eopd.models import build
from megatron_eopd.models.families import FAMILIES
from megatron_eopd.models.families.base import Split
from megatron_eopd.models.hf_weights import HeadShape, global_names, join, shard


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


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("spec", [0, -1], ids=["local", "transformer_engine"])
def test_both_specifications_find_every_weight(family, spec):
    """TransformerEngine fuses the norms into the linear layers; the HF names are the same."""
    names = [row.megatron[spec].format(i=0) for row in family.mappings]
    rows = global_names(skeleton(names, first_layer=3), family, tied=False)
    found = sorted(hf for row in rows.values() for hf in row.hf)
    assert found == sorted(hf.format(i=3) for row in family.mappings for hf in row.hf)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("split", list(Split), ids=lambda s: s.name)
def test_join_undoes_shard(split, tp):
    heads = HeadShape(num_heads=8, num_groups=4, head_dim=3)
    rows = {Split.QKV: [24, 12, 12], Split.GATE_UP: [16, 16]}.get(split, [20])
    wholes = [torch.randn(n, 8) for n in rows]
    vocab = rows[0] - 3 if split is Split.VOCAB else 0
    if vocab:
        wholes = [wholes[0][:vocab]]
    shards = [shard(split, wholes, r, tp, heads, padded_vocab=20) for r in range(tp)]
    for whole, again in zip(wholes, join(split, shards, heads, vocab), strict=True):
        assert torch.equal(whole, again)


def test_specification_follows_what_is_installed(monkeypatch):
    def with_engine(found: bool, implementation: str) -> bool:
        spec = object() if found else None
        monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
        return build.uses_transformer_engine(ModelConfig(transformer_impl=implementation))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert with_engine(True, "auto") and with_engine(True, "transformer_engine")
    assert not with_engine(True, "local") and not with_engine(False, "auto")
    with pytest.raises(ConfigError, match=r"set model\.transformer_impl=local"):
        with_engine(False, "transformer_engine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not with_engine(True, "auto"), "without a GPU its layers cannot run"
