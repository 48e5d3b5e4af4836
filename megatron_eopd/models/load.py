"""Weights of a model at start-up, from a Hugging Face directory or a Megatron checkpoint.

Both hold config.json and the tokenizer, so one path says everything about a model. It may be a root
of Megatron-LM's that holds those two, and its newest checkpoint the weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_eopd.config import ModelConfig
from megatron_eopd.model_paths import is_mcore, resolve_checkpoint
from megatron_eopd.models.build import build_model
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_files import HFCheckpoint, weight_files
from megatron_eopd.models.hf_weights import load_hf_weights
from megatron_eopd.models.mcore_files import MCoreCheckpoint, pieces_of
from megatron_eopd.models.tensor_shapes import tensor_shapes
from megatron_eopd.parallel.collectives import collecting, raise_together
from megatron_eopd.parallel.init import ParallelContext

MakeModel = Callable[[Path, ModelConfig, ParallelContext], list[CausalLM]]
"""From a model's directory to its chunks on this rank, as `load_model` does."""


def load_model(path: Path, model: ModelConfig, context: ParallelContext) -> list[CausalLM]:
    """Built and filled. Collective over the ranks of the model; one's error is raised on all."""
    chunks = build_model(path, model, context)
    errors: list[Exception] = []
    with collecting(errors):  # each rank reads other tensors, so one may fail alone
        load_weights(chunks, path, context)
    raise_together(errors, context.cpu_group)  # before the collectives of the next model's loading
    return chunks


def check_files(path: Path) -> None:
    """Compare all weights with what config.json asks for, by the headers of their files: no rank
    and no model is needed. Of data only an LM head is read that should be the embedding. A Megatron
    checkpoint is compared as it is loaded; here it is seen to be complete.

    Raises:
        ConfigError: config.json is none that a run takes.
        CheckpointError: a file is missing or damaged, or the tensors are not those of the model.
    """
    if is_mcore(resolve_checkpoint(path)):
        _open(path)  # first: what is wrong with its format matters more than a missing config.json
        read_hf_config(path)
        return
    hf_config = read_hf_config(path)
    shapes = tensor_shapes(hf_config)
    with HFCheckpoint(path) as checkpoint:
        checkpoint.check(shapes, set(shapes), tied=hf_config.tie_word_embeddings)
        if hf_config.tie_word_embeddings:
            checkpoint.check_tied_head()


def check_what_is_there(path: Path) -> None:
    """config.json, and `check_files` where weights of any format lie.

    Raises:
        ConfigError, CheckpointError: as check_files.
    """
    read_hf_config(path)
    if is_mcore(resolve_checkpoint(path)) or weight_files(path):
        check_files(path)


def load_weights(chunks: Sequence[CausalLM], path: Path, context: ParallelContext) -> None:
    """Fill this rank's parameters. Collective over all ranks of the model.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    if is_mcore(resolve_checkpoint(path)):
        load_mcore_weights(chunks, path, read_hf_config(path).vocab_size, context)
    else:
        load_hf_weights(chunks, path, read_hf_config(path), context.layout, context.cpu_group)


def load_mcore_weights(
    chunks: Sequence[CausalLM], path: Path, vocab_size: int, context: ParallelContext
) -> None:
    """From a Megatron distributed checkpoint of any layout; of a run's, only the weights. Each rank
    reads what it has. `vocab_size`: without padding."""
    errors: list[Exception] = []
    with collecting(errors):  # one rank may be unable to read
        read_weights(chunks, _open(path), vocab_size)
    raise_together(errors, context.cpu_group)


def read_weights(chunks: Sequence[CausalLM], checkpoint: MCoreCheckpoint, vocab_size: int) -> None:
    """
    Raises:
        CheckpointError: it is of another model.
    """
    pieces = [piece for chunk in chunks for piece in _pieces(chunk, checkpoint)]
    checkpoint.fill(pieces, vocab_size)


def _open(path: Path) -> MCoreCheckpoint:
    checkpoint = MCoreCheckpoint(path)
    checkpoint.check_megatron_reads_it()
    return checkpoint


def _pieces(chunk: CausalLM, checkpoint: MCoreCheckpoint) -> list[ShardedTensor]:
    """Views of the parameters, by the keys of this checkpoint. Objects are TransformerEngine's
    float8 scales, which no layer here has a use for."""
    items = [i for i in chunk.sharded_state_dict().values() if not isinstance(i, ShardedObject)]
    missing = {*chunk.parameters()} - {item.data for item in items}
    assert not missing, f"{len(missing)} parameters have no part in Megatron's state"
    return [p for item in items for p in pieces_of(checkpoint.stored_as(item), item.data.detach())]
