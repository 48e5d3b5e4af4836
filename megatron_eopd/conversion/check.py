"""Whether a Hugging Face directory and a Megatron checkpoint hold the same model.

Every tensor is compared, one at a time; then the logits of a few tokens, transformers' in float32
against the Megatron model's under the layout of the ranks at hand.
"""
# Shapes: S tokens, V vocabulary without padding.

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from megatron_eopd.config import ModelConfig
from megatron_eopd.conversion.skeleton import Group, Skeleton, make_skeleton
from megatron_eopd.conversion.to_hf import check_stored, read_group, refuse_hugging_face
from megatron_eopd.conversion.to_mcore import check_source, refuse_megatron
from megatron_eopd.data.packing import make_microbatches
from megatron_eopd.model_paths import resolve_checkpoint
from megatron_eopd.models.build import build_model
from megatron_eopd.models.fit import check_divides
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_files import HFCheckpoint
from megatron_eopd.models.load import load_mcore_weights
from megatron_eopd.models.mcore_files import MCoreCheckpoint
from megatron_eopd.parallel.collectives import collecting, gather_everywhere, raise_together
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.pipeline import map_hidden
from megatron_eopd.parallel.vocab import gather_vocab
from megatron_eopd.records import MicroBatch, Prompt, Rollout, ScoredRollout

NUM_TOKENS = 32


@dataclass(frozen=True)
class Difference:
    """Of one tensor, or of the logits."""

    name: str
    largest: float
    """Largest absolute difference of two elements."""
    num_different: int
    num_elements: int


def check_kinds(hf_dir: Path, mcore_dir: Path, with_logits: bool) -> None:
    """
    Raises:
        ConfigError: one directory is what the other should be. CheckpointError: the checkpoint
            cannot be read, or has no logits.
    """
    refuse_megatron(hf_dir)
    refuse_hugging_face(mcore_dir)
    checkpoint = MCoreCheckpoint(mcore_dir)
    if with_logits:
        checkpoint.check_megatron_reads_it()


def compare_tensors(hf_dir: Path, mcore_dir: Path, context: ParallelContext) -> list[Difference]:
    """Of every tensor, worst first. Collective, in a context in which nothing is cut.

    Raises:
        CheckpointError: the two have not the same tensors (which are missing is listed).
    """
    skeleton = make_skeleton(read_hf_config(hf_dir), context)
    stored = MCoreCheckpoint(mcore_dir)
    check_stored(stored, skeleton)
    layout = context.layout
    found: list[Difference] = []
    errors: list[Exception] = []
    with HFCheckpoint(hf_dir) as checkpoint:
        check_source(checkpoint, skeleton)
        own = skeleton.groups[layout.rank :: layout.world_size]
        with collecting(errors):
            for group in tqdm(own, desc="tensors", disable=layout.rank != 0):
                found += _compare_group(group, checkpoint, stored, skeleton)
    raise_together(errors, context.cpu_group)
    gathered = gather_everywhere(found, context.cpu_group)
    everything = [difference for part in gathered for difference in part]
    return sorted(everything, key=lambda d: (-d.largest, -d.num_different, d.name))


def _compare_group(
    group: Group, checkpoint: HFCheckpoint, stored: MCoreCheckpoint, skeleton: Skeleton
) -> list[Difference]:
    tensors = read_group(group, stored, skeleton)
    found = []
    for name, tensor in zip(group.hf_shapes, tensors, strict=True):
        # A conversion to another type is right when it is the cast.
        found.append(difference_of(name, checkpoint.slice(name)[:].to(tensor.dtype), tensor))
    return found


def difference_of(name: str, expected: torch.Tensor, tensor: torch.Tensor) -> Difference:
    """Bit for bit: a NaN equals the same NaN, and is infinitely far from all else; 0 and −0 are
    different, with no distance between them."""
    bits = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    different = expected.contiguous().view(bits) != tensor.contiguous().view(bits)
    distances = (expected[different].float() - tensor[different].float()).abs()
    largest = distances.nan_to_num(nan=inf, posinf=inf).max().item() if len(distances) else 0.0
    return Difference(name, largest, len(distances), tensor.numel())


def compare_logits(
    hf_dir: Path, mcore_dir: Path, token_ids: Sequence[int], context: ParallelContext
) -> Difference:
    """Of the logits behind every token but the last, both models in float32. Collective.

    Raises:
        ConfigError: the layout does not divide the model.
    """
    hf_config = read_hf_config(hf_dir)
    check_divides(hf_config, context.layout, "model")
    chunks = build_model(hf_dir, ModelConfig(dtype="float32"), context)
    model = chunks[-1].eval()
    path = resolve_checkpoint(mcore_dir)
    load_mcore_weights(chunks, path, hf_config.vocab_size, context)
    prompt = Prompt(0, text="", answer="", prompt_ids=tuple(token_ids[:1]))
    response = tuple(token_ids[1:])
    rollout = Rollout(prompt, 0, response, (0.0,) * len(response), "stop", 0)
    batches = make_microbatches([[ScoredRollout(rollout)]], context.layout, context.device)

    def at_last_stage(batch: MicroBatch, hidden_S1H: torch.Tensor) -> torch.Tensor:
        logits_SV = model.lm_head(model.pick_rows(hidden_S1H, batch.prediction_rows_N))
        return gather_vocab(logits_SV, context.groups.tp, hf_config.vocab_size)

    result = map_hidden(chunks, batches, at_last_stage, context)
    found: list = [None]
    errors: list[Exception] = []
    with collecting(errors):
        if context.layout.rank == context.layout.last_stage_leader:
            stored = MCoreCheckpoint(mcore_dir).embedding_dtype()
            expected_SV = transformers_logits(hf_dir, token_ids, stored)[:-1]
            # NaN for NaN would be no agreement: such logits show nothing.
            distances = (expected_SV - result[0]).abs().nan_to_num(nan=inf, posinf=inf)
            num_different = int(distances.count_nonzero())
            found = [Difference("logits", distances.max().item(), num_different, distances.numel())]
    raise_together(errors, context.cpu_group)
    dist.broadcast_object_list(found, context.layout.last_stage_leader, context.cpu_group)
    return found[0]


@torch.no_grad()
def transformers_logits(hf_dir: Path, token_ids: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """float32 [S, V], of weights that are cast to `dtype` and back."""
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype).float()
    return model(torch.tensor([list(token_ids)])).logits[0]


def probe_tokens(vocab_size: int) -> list[int]:
    """Fixed random tokens: they touch weights that text may leave alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (NUM_TOKENS,), generator=generator).tolist()
