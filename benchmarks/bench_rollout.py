"""The rollout plane: weights into one engine and two, and samples beside vLLM's own LLM.generate.

A Qwen3 of 58 million parameters in float32, 232 MB. In one process, which is the trainer; engines
are processes of their own, as in a run.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eopd.config import RolloutConfig, WeightSyncConfig
from megatron_eopd.parallel.init import free_port
from megatron_eopd.records import Prompt
from megatron_eopd.rollout import engine_process
from megatron_eopd.rollout.engine import Sampling, numbered_samples
from megatron_eopd.rollout.fleet import Fleet
from megatron_eopd.rollout.handle import EngineHandle
from megatron_eopd.rollout.placement import Seat
from megatron_eopd.rollout.relay import OwnLink, Relay
from megatron_eopd.rollout.states import Life
from megatron_eopd.rollout.vllm_engines import Own, VllmEngines
from megatron_eopd.rollout.vllm_options import engine_spec
from megatron_eopd.weight_sync.manifest import Manifest, TensorSpec
from megatron_eopd.weight_sync.outlet import Outlet
from megatron_eopd.weight_sync.route import StageRoute
from megatron_eopd.weight_sync.verify import SyncCheck

SYNCS, CALLS = 6, 3
NUM_PROMPTS, SAMPLES, TOKENS = 32, 4, 48
BUCKET_MIB = 32.0


class Relays:
    """Of one rank that owns several engines."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self._relays = relays

    def close(self) -> None:
        for relay in self._relays:
            relay.close()


def make_model(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=256,
    )
    model = Qwen3ForCausalLM(config).float()
    model.save_pretrained(folder)
    return model.state_dict()


def in_buckets(tensors: dict[str, torch.Tensor]) -> list[list[tuple[str, torch.Tensor]]]:
    buckets, room = [], 0.0
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            buckets.append([])
            room = BUCKET_MIB * 2**20
        buckets[-1].append((name, tensor))
        room -= tensor.nbytes
    return buckets


@contextmanager
def engines(
    folder: Path, buckets: list[list[tuple[str, torch.Tensor]]], count: int, threads: int
) -> Iterator[VllmEngines]:
    specs = [tuple(TensorSpec(n, "float32", tuple(t.shape)) for n, t in b) for b in buckets]
    manifest = Manifest((tuple(specs),))
    rollout = RolloutConfig(kv_cache_gib=0.25, max_num_seqs=64, num_threads=threads)
    relays = [
        Relay(
            engine_spec(
                model_path=folder,
                dtype="float32",
                seed=1,
                max_model_len=128,
                hf_overrides={},
                rollout=rollout,
                devices=[],
                log_path=folder / f"engine{count}-{n}.txt",
            )
        )
        for n in range(count)
    ]
    handles = [
        EngineHandle(Seat(n, (0,), 0), Life(n, 0), OwnLink(relay)) for n, relay in enumerate(relays)
    ]
    outlet = Outlet(
        manifest,
        [StageRoute(0, {0: 0})],
        [None],
        rank=0,
        node=0,
        own_stage=0,
        export_buckets=lambda: ([t for _, t in bucket] for bucket in buckets),
        device=torch.device("cpu"),
        timeout_s=60,
    )
    made = VllmEngines(
        Fleet(handles, [], manifest, rollout, lambda line: None),
        Own(Relays(relays), None, outlet, 0, dict.fromkeys(range(count), 1)),
        manifest,
        max_model_len=128,
        weight_sync=WeightSyncConfig(),
        sleeps=False,
        score=lambda sequences: [],
        check=SyncCheck(WeightSyncConfig(), "float32"),
        cpu_group=dist.group.WORLD,
    )
    try:
        yield made
    finally:
        made.close()


def time_syncs(engine: VllmEngines) -> dict[str, float]:
    """Medians, in seconds, without the first."""
    reports = [engine.update_weights(version) for version in range(SYNCS)][1:]
    parts = {name: statistics.median(r.parts[name] for r in reports) for name in reports[0].parts}
    return {"seconds": statistics.median(r.seconds for r in reports)} | parts


def time_calls(engine: VllmEngines, plain: bool) -> dict[str, float]:
    """Seconds of the fastest of a few calls, ours and vLLM's own in turns."""
    prompts = [Prompt(n, "", "", tuple(range(n + 3, n + 35))) for n in range(NUM_PROMPTS)]
    sampling = Sampling(SAMPLES, 1.0, TOKENS, stop_ids=(), seed=1)
    jobs = numbered_samples(prompts, sampling)
    requests = [request for group in engine._requests(jobs, sampling) for request in group]
    ours, theirs = [], []
    for _ in range(CALLS + 1):
        begin = time.perf_counter()
        engine.generate(prompts, sampling)
        ours.append(time.perf_counter() - begin)
        if plain:
            (seconds,) = engine._fleet.ask(
                engine._fleet.handles, "time_generate", 600, "generating", requests=requests
            ).values()
            theirs.append(seconds)
    return {"ours": min(ours[1:])} | ({"plain": min(theirs[1:])} if plain else {})


def bench_rollout(copy_gb_per_s: float) -> dict[str, Any]:
    """`copy_gb_per_s`: bytes copied, not read + write, of as many bytes in the same run."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    engine_process.CHILD_MODULE = "plain_child"
    tokens = NUM_PROMPTS * SAMPLES * TOKENS
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
    )
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            buckets = in_buckets(make_model(folder))
            num_bytes = sum(t.nbytes for bucket in buckets for _, t in bucket)
            with engines(folder, buckets, 1, 1) as one:
                sync_one, call_one = time_syncs(one), time_calls(one, plain=True)
            with engines(folder, buckets, 1, 2) as threaded:
                threaded.update_weights(0)
                call_threads = time_calls(threaded, plain=False)
            with engines(folder, buckets, 2, 1) as two:
                sync_two, call_two = time_syncs(two), time_calls(two, plain=False)
    finally:
        dist.destroy_process_group()
    handed_over = num_bytes / (sync_one["gather"] + sync_one["hand_over"]) / 1e9
    return {
        "bytes": num_bytes,
        "copy GB/s (bytes copied, not read + write)": copy_gb_per_s,
        "sync, one engine: seconds": sync_one["seconds"],
        "of them gather and hand-over": sync_one["gather"] + sync_one["hand_over"],
        "of them waiting for the engine": sync_one["wait"],
        "vLLM's loading, beside them": sync_one["load"],
        "gather and hand-over GB/s": handed_over,
        "gather and hand-over / copy": handed_over / copy_gb_per_s,
        "sync, two engines / one": sync_two["seconds"] / sync_one["seconds"],
        "rollout tokens/s, one engine": tokens / call_one["ours"],
        "rollout tokens/s, LLM.generate in the same engine": tokens / call_one["plain"],
        "ours / LLM.generate": call_one["plain"] / call_one["ours"],
        "one engine of two threads / one of one": call_one["ours"] / call_threads["ours"],
        "two engines / one": call_one["ours"] / call_two["ours"],
    }
