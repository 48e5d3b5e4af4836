"""Models of TransformerEngine's specification are built; TransformerEngine itself is a stand-in."""

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import make_model

STAND_INS = Path(__file__).with_name("stand_ins")


def test_every_layer_can_be_constructed(tmp_path):
    """With TransformerEngine and without Apex, as `pip install` leaves a machine: no option may be
    set that one of Megatron's own layers (the LM head, the embedding) refuses."""
    models = [make_model(family, tmp_path / family) for family in ("qwen3", "qwen3_moe")]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path / "rendezvous"), *map(str, models)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(STAND_INS), os.getcwd()])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    built = done.stdout.split("---\n")[1:]
    assert len(built) == len(models)
    for names in built:
        assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
        assert "output_layer.weight" in names


BUILD = """
import sys
from pathlib import Path
import torch.distributed as dist
from megatron_eopd.config import ModelConfig
from megatron_eopd.models.build import build_model
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_weights import weights_of
from megatron_eopd.parallel.init import choose_device
from tests.ranks import context_for, leave_groups

choose_device()
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
for path in map(Path, sys.argv[2:]):
    model = ModelConfig(transformer_impl="transformer_engine")
    (chunk,) = build_model(path, model, context_for(1, 1))
    assert type(chunk.decoder.layers[0].self_attention.linear_proj).__name__.startswith("TE")
    names = [name for name, _ in chunk.named_parameters()]
    assert set(weights_of(chunk, read_hf_config(path))) == set(names), "no row in the weight table"
    print("---", *names, sep="\\n", flush=True)
    leave_groups()
"""
