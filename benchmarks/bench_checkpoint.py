"""What a save costs: memory of each rank, how long it holds up the run, and the steps beside it.

A random Qwen3 of 58 million parameters at data-parallel size 1, 2 and 4, each rank a process;
bench.py --only checkpoint prints the figures.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_eopd.checkpoints import files
from megatron_eopd.checkpoints.position import make_position
from megatron_eopd.checkpoints.saver import Saver
from megatron_eopd.config import Config
from megatron_eopd.config.training import CheckpointConfig
from megatron_eopd.data.packing import Limits, exchange_size, pack, rounds_of
from megatron_eopd.models.build import build_model
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.load import load_weights
from megatron_eopd.parallel.init import ParallelContext, free_port, parallel_context
from megatron_eopd.records import DEFAULT_TEACHER, Prompt, Rollout
from megatron_eopd.schedules import START
from megatron_eopd.teacher.colocated import ColocatedTeacher
from megatron_eopd.teacher.pool import TeacherPool
from megatron_eopd.training.optimizer import Trainable, make_trainable
from megatron_eopd.training.step import train_step
from megatron_eopd.training.token_loss import TokenLoss

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
TOKENS = 128
ROUNDS = 5


@dataclass(frozen=True)
class Work:
    student: Trainable
    step: Callable[[], object]
    num_parameters: int


def bench_checkpoint() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        model = Path(folder) / "model"
        Qwen3ForCausalLM(Qwen3Config(**SHAPE)).bfloat16().save_pretrained(model)
        for dtype, dp in (("float32", 1), ("float32", 2), ("float32", 4), ("bfloat16", 2)):
            out = Path(folder) / f"{dtype}-{dp}.pt"
            arguments = (dp, free_port(), model, dtype, out)
            mp.start_processes(_rank, arguments, nprocs=dp, start_method="spawn")
            figures |= {f"{dtype}, DP {dp}: {k}": v for k, v in torch.load(out).items()}
    return figures


def _rank(rank: int, dp: int, port: int, model: Path, dtype: str, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(dp), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    config = _config(model, dtype, dp)
    with parallel_context(config.parallel, seed=1, longest_wait_s=0) as context:
        work = _work(config, context)
        work.step()
        figures = _memory(work, model, out.with_suffix(""), context)
        figures |= _time(work, model, out.with_suffix(""), context)
        gathered: list = [None] * dp
        torch.distributed.all_gather_object(gathered, figures, group=context.cpu_group)
        if rank == 0:
            # Memory: of the rank that needs most. Time: all wait for each other anyway.
            torch.save({name: max(f[name] for f in gathered) for name in figures}, out)


def _config(model: Path, dtype: str, dp: int) -> Config:
    batch = 2 * dp
    return Config.model_validate(
        {
            "run_dir": "unused",
            "student": {"hf_path": model},
            "teacher": {"hf_path": model},
            "model": {"dtype": dtype},
            "rollout": {"batch_size": batch},
            "training": {"global_batch_size": batch, "check_replicas_interval": 0},
        }
    )


def _work(config: Config, context: ParallelContext) -> Work:
    path, vocab_size = config.student.hf_path, read_hf_config(config.student.hf_path).vocab_size
    chunks = build_model(path, config.model, context)
    load_weights(chunks, path, context)
    teacher = ColocatedTeacher(config.teacher, "teacher", config, (), vocab_size, context)
    pool = TeacherPool({DEFAULT_TEACHER: teacher}, context)
    token_loss = TokenLoss(chunks[-1], pool.heads, config, vocab_size, context)
    student = make_trainable(chunks, config, context)
    ids = torch.randint(vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    rollout = Rollout(Prompt(0, "", "", (ids[0],)), 0, tuple(ids[1:]), (-5.0,) * 127, "stop", 0)
    rollouts = [rollout] * config.rollout.batch_size
    rounds = rounds_of(
        pack(rollouts, Limits.of(config.training), context.layout), exchange_size(config)
    )

    def step() -> None:
        scored = pool.microbatches(rounds)
        train_step(student, token_loss, scored, context, num_rounds=len(rounds), progress=START)

    return Work(student, step, sum(p.numel() for chunk in chunks for p in chunk.parameters()))


def _saver(model: Path, run_dir: Path, context: ParallelContext, **options: Any) -> Saver:
    return Saver(run_dir, model, CheckpointConfig(keep_last=1, **options), context, print)


def _memory(work: Work, model: Path, run_dir: Path, context: ParallelContext) -> dict[str, float]:
    """Bytes per parameter above what the rank had before, at the highest."""
    figures = {}
    for name, options in {"written at once": {"async_save": False}, "copied first": {}}.items():
        saver = _saver(model, run_dir, context, **options)
        position = make_position(1, 1, "", context)
        before = _reset_peak()
        saver.save(work.student, position)
        saver.finish()
        figures[f"peak of a save, {name}: bytes / parameter"] = (
            _memory_of("VmHWM") - before
        ) / work.num_parameters
    own = files.newest(run_dir).glob(f"__{context.layout.rank}_*")
    figures["own share: bytes / parameter"] = (
        sum(path.stat().st_size for path in own) / work.num_parameters
    )
    return figures


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is used now
    return _memory_of("VmRSS")


def _memory_of(name: str) -> int:
    """Bytes, by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _time(work: Work, model: Path, run_dir: Path, context: ParallelContext) -> dict[str, float]:
    """Alternating, so that a busy machine touches both."""
    saver = _saver(model, run_dir, context)
    alone, first, second, held = [], [], [], []
    for number in range(1, ROUNDS + 1):
        alone += [_seconds(work.step) for _ in range(2)]
        position = make_position(number, 1, "", context)
        held.append(_seconds(partial(saver.save, work.student, position)))
        first.append(_seconds(work.step))
        second.append(_seconds(work.step))
        saver.finish()
    step = statistics.median(alone)
    return {
        "step: s": step,
        "first step beside a save, ratio": statistics.median(first) / step,
        "second step beside a save, ratio": statistics.median(second) / step,
        "a save holds up the run: s": statistics.median(held),
    }


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
