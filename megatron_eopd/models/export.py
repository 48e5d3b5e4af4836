"""The student as whole Hugging Face tensors, bucket by bucket: for the engine and for the disk.

In: the model. Out: buckets of (name, tensor), each gathered over the tensor-parallel group before
it is handed on, never the whole model at once. What leaves is fixed at start-up by `Exporter`:
the weight sync sends its manifest, the HF directory is written from the same buckets.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import PretrainedConfig

from megatron_eopd.models.build import CausalLM
from megatron_eopd.models.families import family_of
from megatron_eopd.models.families.base import Mapping
from megatron_eopd.models.hf_weights import HeadShape, global_names, join
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.weight_sync.manifest import Bucket, Manifest, TensorSpec

MAX_FILE_BYTES = 5 * 1000**3


class Exporter:
    """Plan made once: which parameters form which bucket on this pipeline stage."""

    def __init__(
        self,
        model: CausalLM,
        hf_config: PretrainedConfig,
        context: ParallelContext,
        bucket_bytes: int,
    ) -> None:
        self._context = context
        self._heads = HeadShape.of(hf_config)
        self._vocab = hf_config.vocab_size
        rows = global_names(model, family_of(hf_config.model_type), hf_config.tie_word_embeddings)
        parameters = dict(model.named_parameters())
        if hf_config.tie_word_embeddings:
            # The embedding owns the tied weight; the last stage's copy is not sent a second time.
            parameters.pop("output_layer.weight", None)
        entries = [(p, rows[name]) for name, p in parameters.items()]
        self._buckets = list(_fill_buckets(entries, bucket_bytes // context.layout.tp))
        self.manifest = self._gather_manifest()

    def buckets(self) -> Iterator[list[torch.Tensor]]:
        """Whole tensors in manifest order on the leader of each stage, empty lists elsewhere.

        Collective: every rank of the first data-parallel replica gathers with its tensor-parallel
        group, so every rank must exhaust the iterator. A bucket is complete when handed out.
        """
        layout = self._context.layout
        for entries in self._buckets if layout.dp_rank == 0 else ():
            shards = self._gather(entries)
            yield self._join(entries, shards) if layout.leads_stage is not None else []

    def _gather(self, entries: list) -> list[torch.Tensor]:
        """One coalesced all-gather: the flat bucket of every tensor-parallel rank."""
        flat = torch.cat([p.detach().flatten() for p, _ in entries])
        gathered = [torch.empty_like(flat) for _ in range(self._context.layout.tp)]
        dist.all_gather(gathered, flat, group=self._context.groups.tp)
        return gathered

    def _join(self, entries: list, gathered: list[torch.Tensor]) -> list[torch.Tensor]:
        sizes = [p.numel() for p, _ in entries]
        by_rank = [flat.split(sizes) for flat in gathered]
        wholes = []
        for column, (parameter, row) in enumerate(entries):
            shards = [parts[column].view(parameter.shape) for parts in by_rank]
            wholes += join(row.split, shards, self._heads, self._vocab)
        return wholes

    def _gather_manifest(self) -> Manifest:
        own = tuple(
            tuple(spec for parameter, row in entries for spec in self._specs(parameter, row))
            for entries in self._buckets
        )
        stages: list = [None] * self._context.layout.pp
        dist.all_gather_object(stages, own, group=self._context.groups.pp)
        return Manifest(tuple(stages))

    def _specs(self, parameter: torch.nn.Parameter, row: Mapping) -> list[TensorSpec]:
        # Meta tensors of all shards, joined by the real function: no second set of shape rules.
        shards = [torch.empty_like(parameter, device="meta")] * self._context.layout.tp
        wholes = join(row.split, shards, self._heads, self._vocab)
        dtype = str(parameter.dtype).removeprefix("torch.")
        return [TensorSpec(n, dtype, tuple(w.shape)) for n, w in zip(row.hf, wholes, strict=True)]

    def save_hf(self, source: Path, target: Path) -> None:
        """Write a Hugging Face directory: weights from here, everything else copied from `source`.

        Collective. `target` appears complete or not at all.
        """
        layout = self._context.layout
        unfinished = target.with_name(target.name + ".unfinished")
        if layout.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        dist.barrier(group=self._context.cpu_group)
        written = self._write_stage(unfinished)
        gathered: list = [None] * layout.world_size
        dist.all_gather_object(gathered, written, group=self._context.cpu_group)
        if layout.rank == 0:
            files = {name: specs for written in gathered for name, specs in written.items()}
            _finish_hf_directory(source, unfinished, files)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
        dist.barrier(group=self._context.cpu_group)

    def _write_stage(self, directory: Path) -> dict[str, Bucket]:
        """File name → what this rank wrote into it; nothing on ranks that lead no stage."""
        stage = self._context.layout.leads_stage
        written: dict[str, Bucket] = {}
        pending: dict[str, torch.Tensor] = {}
        specs: list[TensorSpec] = []

        def flush() -> None:
            if specs:
                name = f"model-stage{stage:03d}-{len(written):05d}.safetensors"
                save_file(pending, directory / name, metadata={"format": "pt"})
                written[name] = tuple(specs)
                pending.clear()
                specs.clear()

        for number, tensors in enumerate(self.buckets()):
            if stage is None:
                continue
            bucket = self.manifest.stages[stage][number]
            if sum(s.num_bytes for s in (*specs, *bucket)) > MAX_FILE_BYTES:
                flush()
            specs += bucket
            for spec, tensor in zip(bucket, tensors, strict=True):
                pending[spec.name] = tensor.contiguous().cpu()
        flush()
        return written


def _fill_buckets(entries: list, shard_bytes: int) -> Iterator[list]:
    """Consecutive parameters of at most shard_bytes and one dtype; one parameter, with all HF
    tensors it makes, is never cut."""
    bucket: list = []
    size = 0
    for parameter, row in entries:
        num_bytes = math.prod(parameter.shape) * parameter.dtype.itemsize
        if bucket and (size + num_bytes > shard_bytes or bucket[0][0].dtype != parameter.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append((parameter, row))
        size += num_bytes
    if bucket:
        yield bucket


def _finish_hf_directory(source: Path, directory: Path, files: dict[str, Bucket]) -> None:
    for path in Path(source).iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copy(path, directory / path.name)
    config = json.loads((directory / "config.json").read_text())
    some_spec = next(iter(files.values()))[0]
    config.pop("torch_dtype", None)
    config["dtype"] = some_spec.dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(files) == 1:
        (directory / next(iter(files))).rename(directory / "model.safetensors")
        return
    index = {
        "metadata": {"total_size": sum(s.num_bytes for specs in files.values() for s in specs)},
        "weight_map": {s.name: file for file, specs in files.items() for s in specs},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
