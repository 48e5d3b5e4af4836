"""Time and memory of checkpoint conversion, beside a plain copy of the same files in the same run.

A random Qwen3 checkpoint of the 0.6B's shape, bf16, is converted both ways by the command line
tool, each in a process of its own, whose peak memory is then its own; bench.py --only convert
prints the figures.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config

from megatron_eopd.models.hf_files import (
    SafetensorsWriter,
    name_files,
    plan_files,
    write_index_and_config,
)
from megatron_eopd.weight_sync.manifest import TensorSpec

TOOL = Path(__file__).parents[1] / "tools/convert_hf.py"
QWEN3_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}
NUM_LAYERS = 44
"""0.6B has 28; with so many, and with a head of its own, the files have 2 GB."""


def bench_convert(num_layers: int = NUM_LAYERS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        source, mcore, back = (Path(folder) / name for name in ("hf", "mcore", "back"))
        tiny, tiny_mcore = Path(folder) / "tiny", Path(folder) / "tiny-mcore"
        make_checkpoint(source, Qwen3Config(**QWEN3_06B, num_hidden_layers=num_layers))
        make_checkpoint(tiny, Qwen3Config(**QWEN3_06B | {"vocab_size": 128}, num_hidden_layers=1))
        starting, base = run([sys.executable, str(TOOL), "to-mcore", str(tiny), str(tiny_mcore)])
        num_bytes = size_of(source)
        copying = copy_seconds(source, Path(folder) / "copy")
        figures: dict[str, Any] = {
            "bytes": num_bytes,
            "largest tensor group, MB": largest_group(source) / 1e6,
            "copy of the files, fsync included: s": copying,
            "copy: GB/s": num_bytes / copying / 1e9,
            "a process that converts next to nothing: s": starting,
            "a process that converts next to nothing: peak, MB": base / 1e6,
        }
        commands = {
            "to-mcore": [sys.executable, str(TOOL), "to-mcore", str(source), str(mcore)],
            "to-hf": [sys.executable, str(TOOL), "to-hf", str(mcore), str(back)],
        }
        for name, command in commands.items():
            seconds, peak = run(command)
            figures[f"{name}: s"] = seconds
            figures[f"{name}: GB/s"] = num_bytes / seconds / 1e9
            figures[f"{name}: peak of the process, MB"] = peak / 1e6
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        for name, command in commands.items():
            seconds, _ = run([sys.executable, *torchrun, *command[1:], "--overwrite"])
            figures[f"{name}, 2 ranks: s"] = seconds
    return figures


def make_checkpoint(path: Path, config: Qwen3Config) -> None:
    """Random weights, written file by file."""
    path.mkdir()
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(path)
    GenerationConfig(eos_token_id=0).save_pretrained(path)
    groups = [[TensorSpec(n, "bfloat16", shape)] for n, shape in qwen3_shapes(config)]
    files = name_files(plan_files(groups, 1000**3))
    generator = torch.Generator().manual_seed(0)
    for planned in files:
        with SafetensorsWriter(path, planned) as writer:
            for spec in planned.specs:
                writer.write(torch.randn(spec.shape, generator=generator).mul_(0.02))
    write_index_and_config(path, files)


def qwen3_shapes(config: Qwen3Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        for name, shape in (
            ("input_layernorm", (hidden,)),
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
            ("self_attn.q_norm", (head,)),
            ("self_attn.k_norm", (head,)),
            ("self_attn.o_proj", (hidden, queries)),
            ("post_attention_layernorm", (hidden,)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):
            yield f"model.layers.{i}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def largest_group(path: Path) -> int:
    """The embedding, which here is larger than any parameter that is made of several tensors."""
    config = Qwen3Config.from_pretrained(path)
    return 2 * config.vocab_size * config.hidden_size


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def copy_seconds(source: Path, target: Path) -> float:
    begin = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - begin


def run(command: list[str]) -> tuple[float, int]:
    """Seconds, and the peak memory of the process in bytes."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PEAK_OF, *command], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return time.perf_counter() - begin, int(done.stdout.splitlines()[-1]) * 1024


# A process inherits the peak of the one that starts it, so a small one stands between.
_PEAK_OF = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
