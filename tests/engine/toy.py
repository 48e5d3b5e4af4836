"""A trainer small enough for a test: a Hugging Face Qwen3 that exports its own state dict."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3ForCausalLM

from megatron_eopd.config import RolloutConfig, WeightSyncConfig
from megatron_eopd.records import Prompt
from megatron_eopd.rollout.vllm_engine import VllmEngine, launch_vllm
from megatron_eopd.weight_sync.manifest import Manifest, TensorSpec

PROBES = [[1, 5, 9, 200, 34, 7], [3, 3, 3, 250, 17, 99, 100, 8]]
MAX_MODEL_LEN = 128


def largest_difference(
    engine: Sequence[Sequence[float]], trainer: Sequence[Sequence[float]]
) -> float:
    """Largest |Δ| in nats over all tokens of all sequences."""
    rows = zip(engine, trainer, strict=True)
    return max(abs(a - b) for ours, theirs in rows for a, b in zip(ours, theirs, strict=True))


class ToyTrainer:
    def __init__(
        self, hf_dir: Path, num_stages: int = 1, tensors_per_bucket: int = 7, dtype: str = "float32"
    ):
        self.hf_dir = hf_dir
        self.dtype = dtype
        self.model = Qwen3ForCausalLM.from_pretrained(hf_dir, dtype=getattr(torch, dtype))
        state = self.model.state_dict()
        if self.model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        names = list(state)
        per_stage = -(-len(names) // num_stages)
        # Bucket borders fall inside layers, and between the parts of fused parameters.
        self.stages = [
            [
                stage_names[i : i + tensors_per_bucket]
                for i in range(0, len(stage_names), tensors_per_bucket)
            ]
            for stage_names in (
                names[s * per_stage : (s + 1) * per_stage] for s in range(num_stages)
            )
        ]
        self.manifest = Manifest(
            tuple(
                tuple(
                    tuple(TensorSpec(n, dtype, tuple(state[n].shape)) for n in bucket)
                    for bucket in stage
                )
                for stage in self.stages
            )
        )

    def export(self, stage: int = 0) -> Iterator[list[torch.Tensor]]:
        state = self.model.state_dict()
        for bucket in self.stages[stage]:
            yield [state[name] for name in bucket]

    @torch.no_grad()
    def train(self, seed: int) -> None:
        """Move every weight, as an optimizer step would, only further."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            step = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(step.to(parameter.dtype))

    @torch.no_grad()
    def score(self, ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        logits = self.model(torch.tensor([list(ids)])).logits[0, :-1].double() / temperature
        return logits.log_softmax(-1)[torch.arange(len(ids) - 1), list(ids)[1:]].tolist()

    def probes(self) -> list[list[float]]:
        return [self.score(ids) for ids in PROBES]

    def start_engine(
        self, log_path: Path, *, engine_tp: int = 1, max_model_len: int = MAX_MODEL_LEN, **overrides
    ) -> VllmEngine:
        rollout = RolloutConfig(
            kv_cache_gib=1 / 16, max_num_seqs=16, tensor_model_parallel_size=engine_tp
        )
        launch = {
            "model_path": self.hf_dir,
            "dtype": self.dtype,
            "seed": 1,
            "max_model_len": max_model_len,
            "hf_overrides": {},
            "rollout": rollout,
            "log_path": log_path,
        }
        process = launch_vllm(**launch) if dist.get_rank() == 0 else None
        arguments = {
            "max_model_len": max_model_len,
            "rollout": rollout,
            "weight_sync": WeightSyncConfig(timeout_s=30),
            "manifest": self.manifest,
            "stage_leader": 0,
            "export_buckets": self.export,
            "cpu_group": dist.group.WORLD,
        }
        return VllmEngine(process, **(arguments | overrides))


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(i, "", "", tuple(range(i + 1, i + 4 + i % 3))) for i in range(count)]
