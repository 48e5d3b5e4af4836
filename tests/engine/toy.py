"""A trainer small enough for a test: a Hugging Face Qwen3 that exports its own state dict."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3ForCausalLM

from megatron_eopd.config import RolloutConfig, WeightSyncConfig
from megatron_eopd.records import Prompt
from megatron_eopd.rollout.fleet import Fleet
from megatron_eopd.rollout.handle import EngineHandle
from megatron_eopd.rollout.placement import Seat
from megatron_eopd.rollout.relay import OwnLink, Relay
from megatron_eopd.rollout.states import Life
from megatron_eopd.rollout.vllm_engines import Own, VllmEngines
from megatron_eopd.rollout.vllm_options import EngineSpec, engine_spec
from megatron_eopd.weight_sync.manifest import Manifest, TensorSpec
from megatron_eopd.weight_sync.outlet import Outlet
from megatron_eopd.weight_sync.route import StageRoute
from megatron_eopd.weight_sync.verify import SyncCheck

PROBES = [[1, 5, 9, 200, 34, 7], [3, 3, 3, 250, 17, 99, 100, 8]]
MAX_MODEL_LEN = 128


def largest_difference(
    engine: Sequence[Sequence[float]], trainer: Sequence[Sequence[float]]
) -> float:
    """Largest |Δ| in nats over all tokens of all sequences."""
    rows = zip(engine, trainer, strict=True)
    return max(abs(a - b) for ours, theirs in rows for a, b in zip(ours, theirs, strict=True))


class AllRelays:
    """Of one rank that owns several engines."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self._relays = relays

    def close(self) -> None:
        for relay in self._relays:
            relay.close()


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
        self,
        log_path: Path,
        *,
        num_engines: int = 1,
        engine_tp: int = 1,
        max_model_len: int = MAX_MODEL_LEN,
        sync_timeout_s: float = 30,
        export: Callable[[], Iterator[list[torch.Tensor]]] | None = None,
        tell: Callable[[str], None] = print,
        **options,
    ) -> VllmEngines:
        """All engines on rank 0; every rank of the world leads a stage. `options`: of rollout."""
        rank, world = dist.get_rank(), dist.get_world_size()
        usual = {
            "kv_cache_gib": 1 / 16,
            "max_num_seqs": 16,
            "tensor_model_parallel_size": engine_tp,
        }
        rollout = RolloutConfig(**(usual | options))
        relays = []
        if rank == 0:
            relays = [
                Relay(self.spec(log_path.with_suffix(f".{n}.txt"), max_model_len, rollout))
                for n in range(num_engines)
            ]
        handles = [
            EngineHandle(
                Seat(n, (0,) * engine_tp, 0), Life(n, rollout.max_restarts), OwnLink(relay)
            )
            for n, relay in enumerate(relays)
        ]
        outlet = Outlet(
            self.manifest,
            [StageRoute(leader, {0: leader}) for leader in range(world)],
            [None] * world,
            rank=rank,
            node=0,
            own_stage=rank,
            export_buckets=export or self.export,
            device=torch.device("cpu"),
            timeout_s=sync_timeout_s,
        )
        readers = dict.fromkeys(range(num_engines), engine_tp)
        own = Own(AllRelays(relays) if relays else None, None, outlet, 0, readers)
        return VllmEngines(
            Fleet(handles, [], self.manifest, rollout, tell) if rank == 0 else None,
            own,
            self.manifest,
            max_model_len=max_model_len,
            weight_sync=WeightSyncConfig(timeout_s=sync_timeout_s),
            sleeps=True,
            score=lambda sequences: [self.score(ids) for ids in sequences],
            check=SyncCheck(WeightSyncConfig(), self.dtype),
            cpu_group=dist.group.WORLD,
        )

    def spec(self, log_path: Path, max_model_len: int, rollout: RolloutConfig) -> EngineSpec:
        return engine_spec(
            model_path=self.hf_dir,
            dtype=self.dtype,
            seed=1,
            max_model_len=max_model_len,
            hf_overrides={},
            rollout=rollout,
            devices=[],
            log_path=log_path,
        )


def scores(engine: VllmEngines, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
    """Of every engine that serves, on every rank."""

    def ask(fleet: Fleet) -> list[list[list[float]]]:
        ids = [list(sequence) for sequence in sequences]
        found = fleet.ask(fleet.serving, "score", 60, "scoring", sequences=ids)
        return [found[number] for number in sorted(found)]

    return engine._led(ask)


def pids(engine: VllmEngines) -> list[int]:
    """Of the engines' processes, by their numbers; on rank 0."""
    return [handle.link._relay._process.pid for handle in engine._fleet.handles]


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(i, "", "", tuple(range(i + 1, i + 4 + i % 3))) for i in range(count)]
