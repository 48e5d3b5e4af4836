"""The student as whole Hugging Face tensors, bucket by bucket: for the engine and for the disk.

In: the model. Out: buckets of (name, tensor), each gathered over the ranks that hold its shards
before it is handed on, never the whole model at once. What leaves is fixed at start-up by
`Exporter`: the weight sync sends its manifest, the HF directory is written from the same buckets.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.models.hf_files import (
    PlannedFile,
    SafetensorsWriter,
    copy_side_files,
    name_files,
    plan_files,
    write_index_and_config,
)
from megatron_eopd.models.hf_weights import Weight, head_shape, hf_shapes, join, weights_of
from megatron_eopd.parallel.collectives import collecting, gather_everywhere, raise_together
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.weight_sync.manifest import Manifest, TensorSpec

MAX_FILE_BYTES = 5 * 1000**3

Entry = tuple[torch.nn.Parameter, Weight]


@dataclass(frozen=True)
class Gathering:
    """The ranks that together hold all shards of a kind of parameter, within one stage."""

    group: dist.ProcessGroup
    num_tp: int
    num_ep: int
    takes_part: bool
    """False on the ranks of all data- and context-parallel replicas but the first."""

    @property
    def size(self) -> int:
        return self.num_tp * self.num_ep


class Exporter:
    """Plan made once: which parameters form which bucket on this pipeline stage."""

    def __init__(
        self,
        chunks: Sequence[CausalLM],
        hf_config: PretrainedConfig,
        vocab_size: int,
        context: ParallelContext,
        bucket_bytes: int,
    ) -> None:
        """`vocab_size`: rows of embedding and LM head that leave, the first so many."""
        self._context = context
        self._heads = head_shape(hf_config)
        self._vocab = vocab_size
        layout, groups = context.layout, context.groups
        first_expert_copy = layout.rank_in_stage < layout.ep * layout.expert_tp
        self._gatherings = {
            False: Gathering(groups.tp, layout.tp, 1, layout.rank_in_stage < layout.tp),
            True: Gathering(groups.tp_ep, layout.expert_tp, layout.ep, first_expert_copy),
        }
        entries: list[Entry] = []
        for chunk in chunks:
            weights = weights_of(chunk, hf_config)
            # The embedding owns a tied weight; the last stage's copy is not sent a second time.
            entries += [
                (p, weights[n]) for n, p in chunk.named_parameters() if not weights[n].tied_head
            ]
        self._buckets = list(self._fill_buckets(entries, bucket_bytes))
        self.manifest = self._gather_manifest()

    def buckets(self) -> Iterator[list[torch.Tensor]]:
        """Whole tensors in manifest order on the leader of each stage, empty lists elsewhere.

        Collective: every rank that holds a first copy of something gathers it with the others that
        do, so every rank must exhaust the iterator. A bucket is complete when handed out.
        """
        for entries in self._buckets:
            if self._gatherings[entries[0][1].row.is_expert].takes_part:
                yield self._wholes(entries)

    def buckets_everywhere(self, group: dist.ProcessGroup) -> Iterator[dict[str, torch.Tensor]]:
        """Whole tensors by their names, one stage's buckets after the other's, on every rank.

        Collective over all ranks of the model, which must exhaust it: each bucket is broadcast by
        the leader of its stage. `group`: of all of them.
        """
        layout = self._context.layout
        for stage, buckets in enumerate(self.manifest.stages):
            for number, specs in enumerate(buckets):
                wholes: list[torch.Tensor] = []
                if stage == layout.pp_rank:
                    wholes = self._wholes(self._buckets[number])
                sizes = [math.prod(spec.shape) for spec in specs]
                flat = torch.empty(
                    sum(sizes), dtype=getattr(torch, specs[0].dtype), device=self._context.device
                )
                if wholes:
                    torch.cat([whole.flatten() for whole in wholes], out=flat)
                dist.broadcast(flat, src=stage * layout.stage_size, group=group)
                parts = zip(specs, flat.split(sizes), strict=True)
                yield {spec.name: part.view(spec.shape) for spec, part in parts}

    def _wholes(self, entries: list[Entry]) -> list[torch.Tensor]:
        """Of a bucket, on the leader of the stage; the ranks that hold parts of it gather them."""
        gathering = self._gatherings[entries[0][1].row.is_expert]
        if not gathering.takes_part:
            return []
        shards = self._gather(entries, gathering)
        leads = self._context.layout.leads_stage is not None
        return self._join(entries, shards, gathering) if leads else []

    def _fill_buckets(self, entries: list[Entry], bucket_bytes: int) -> Iterator[list[Entry]]:
        """Consecutive parameters of about bucket_bytes, one dtype and one gathering; one
        parameter, with all HF tensors it makes, is never cut."""
        bucket: list[Entry] = []
        size = 0
        for parameter, weight in entries:
            kind = (parameter.dtype, weight.row.is_expert)
            num_bytes = parameter.nbytes * self._gatherings[weight.row.is_expert].size
            other = bucket and kind != (bucket[0][0].dtype, bucket[0][1].row.is_expert)
            if bucket and (other or size + num_bytes > bucket_bytes):
                yield bucket
                bucket, size = [], 0
            bucket.append((parameter, weight))
            size += num_bytes
        if bucket:
            yield bucket

    def _gather(self, entries: list[Entry], gathering: Gathering) -> list[Sequence[torch.Tensor]]:
        """The flat shards of every rank of the group, by one coalesced all-gather; where there is
        one rank, the parameters themselves."""
        own = [p.detach().flatten() for p, _ in entries]
        if gathering.size == 1:
            return [own]
        flat = torch.cat(own)
        gathered = [torch.empty_like(flat) for _ in range(gathering.size)]
        dist.all_gather(gathered, flat, group=gathering.group)
        return [rank.split([shard.numel() for shard in own]) for rank in gathered]

    def _join(
        self,
        entries: list[Entry],
        by_rank: list[Sequence[torch.Tensor]],
        gathering: Gathering,
    ) -> list[torch.Tensor]:
        wholes = []
        for ep_rank in range(gathering.num_ep):
            ranks = by_rank[ep_rank * gathering.num_tp : (ep_rank + 1) * gathering.num_tp]
            for column, (parameter, weight) in enumerate(entries):
                shards = [parts[column].view(parameter.shape) for parts in ranks]
                wholes += join(weight.row.split, shards, self._heads, self._vocab)
        return wholes

    def _gather_manifest(self) -> Manifest:
        own = tuple(tuple(self._specs(entries)) for entries in self._buckets)
        stages = gather_everywhere(own, self._context.groups.pp)
        return Manifest(tuple(stages))

    def _specs(self, entries: list[Entry]) -> Iterator[TensorSpec]:
        """In the order of `_join`."""
        gathering = self._gatherings[entries[0][1].row.is_expert]
        for ep_rank in range(gathering.num_ep):
            for parameter, weight in entries:
                split, size = weight.row.split, gathering.num_tp
                shapes = hf_shapes(split, parameter, size, self._heads, self._vocab)
                dtype = str(parameter.dtype).removeprefix("torch.")
                for name, shape in zip(weight.hf_names(ep_rank), shapes, strict=True):
                    yield TensorSpec(name, dtype, shape)

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
        by_stage = [plan_files(stage, MAX_FILE_BYTES) for stage in self.manifest.stages]
        files = name_files([specs for stage in by_stage for specs in stage])
        before = sum(len(stage) for stage in by_stage[: layout.pp_rank])
        errors: list[Exception] = []
        with collecting(errors):
            self._write_stage(unfinished, files[before : before + len(by_stage[layout.pp_rank])])
        raise_together(errors, self._context.cpu_group)
        if layout.rank == 0:
            copy_side_files(source, unfinished)
            write_index_and_config(unfinished, files)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
        dist.barrier(group=self._context.cpu_group)

    def _write_stage(self, directory: Path, files: list[PlannedFile]) -> None:
        """The files of this rank's stage, by its leader; the other ranks gather with it."""
        tensors = (tensor for bucket in self.buckets() for tensor in bucket)
        try:
            for planned in files if self._context.layout.leads_stage is not None else ():
                with SafetensorsWriter(directory, planned) as writer:
                    for _ in planned.specs:
                        writer.write(next(tensors))
        finally:
            # Also after an error, because the other ranks are in the collectives of the export.
            for _ in tensors:
                pass
