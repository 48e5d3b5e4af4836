"""Megatron distributed checkpoints of a run: model, optimizer, RNG and position.

A checkpoint is a directory in Megatron's torch_dist format, readable under another parallel layout;
checkpoint_files.py says which there are.
"""

import json
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_eopd.checkpoint_files import (
    DONE,
    Sum,
    checkpoint_dir,
    complete,
    problems_of,
    read_sums,
    sum_files,
    write_sums,
)
from megatron_eopd.config import Config
from megatron_eopd.errors import CheckpointError
from megatron_eopd.model_paths import is_mcore
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.models.hf_files import copy_side_files
from megatron_eopd.models.mcore_files import loading_errors
from megatron_eopd.parallel.collectives import (
    collecting,
    lost_rank,
    raise_together,
    tells_of_lost_rank,
)
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.training.optimizer import Trainable

_OPTIMIZER_FORMAT = {
    # The one format that another data-parallel size can load.
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    # Whether a rank has experts' optimizers beside the others' must not show in the keys.
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class Position:
    """Where a run stands, and what must not change when it goes on."""

    iteration: int
    """Iterations finished; also the version of the weights."""
    seed: int
    prompts_digest: str
    layout: dict[str, int]
    """Sizes the checkpoint was written under; RNG states are taken back only under the same."""
    references_digest: str = ""
    """Of the reference answers; empty without any."""
    optimizer_steps: int | None = None
    """Taken in all, with whatever batch sizes; None in checkpoints from before it was counted."""
    train_iters: int | None = None
    """Of the run that wrote it: schedules may stretch over all of them."""
    is_evaluated: bool = True
    """Whether the evaluation that is due at this iteration was made; a run that stops over a
    faulty engine saves before it."""

    def steps_of(self, config: Config) -> int:
        """Optimizer steps taken; where nobody counted, as the options have them now."""
        if self.optimizer_steps is not None:
            return self.optimizer_steps
        return self.iteration * config.optimizer_steps_per_iteration


def save(
    run_dir: Path,
    student: Trainable,
    position: Position,
    hf_path: Path,
    keep_last: int,
    context: ParallelContext,
) -> None:
    """Write one checkpoint and remove the ones beyond keep_last. Collective.

    hf_path: where config.json and the tokenizer are; they are copied, so that the checkpoint can be
    converted, or another run start from its weights, without anything beside it.
    """
    directory = checkpoint_dir(run_dir, position.iteration)
    with _saving_errors(directory):
        _write(directory, student, position, hf_path, context)
    if context.layout.rank == 0:
        for old in complete(run_dir)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier(group=context.cpu_group)


def _write(
    directory: Path, student: Trainable, position: Position, hf_path: Path, context: ParallelContext
) -> None:
    is_first, group = context.layout.rank == 0, context.cpu_group
    errors: list[Exception] = []
    with collecting(errors):
        if is_first:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
    raise_together(errors, group)
    state = _sharded_state(student, context, is_loading=False, with_rng=True)
    dist_checkpointing.save(state, str(directory))
    dist.barrier(group=group)
    own: dict[str, Sum] = {}
    with collecting(errors):
        if is_first:
            copy_side_files(hf_path, directory)
            (directory / "position.json").write_text(json.dumps(vars(position), indent=2) + "\n")
        own = sum_files(
            path for path in directory.iterdir() if _writer(path) == context.layout.rank
        )
    raise_together(errors, group)
    every: list = [None] * context.layout.world_size
    dist.all_gather_object(every, own, group=group)
    with collecting(errors):
        if is_first:
            write_sums(directory, {name: found for rank in every for name, found in rank.items()})
    raise_together(errors, group)


def _writer(path: Path) -> int:
    """The rank that wrote a file: torch.distributed.checkpoint names data `__RANK_NUMBER.distcp`,
    and rank 0 writes all else."""
    named = re.fullmatch(r"__(\d+)_\d+\.distcp", path.name)
    return int(named[1]) if named else 0


@contextmanager
def _saving_errors(directory: Path) -> Iterator[None]:
    """Whatever writing raises; the last checkpoint that is complete stays."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:
        if tells_of_lost_rank(error):
            raise lost_rank(error, f"saving {directory}") from error
        failures = getattr(error, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else error
        raise CheckpointError(
            f"{directory}: the checkpoint cannot be written ({cause}). Earlier ones are whole. "
            f"Make room, or see to it that all ranks may write there, and start the same command "
            f"again."
        ) from error


def read_position(directory: Path) -> Position:
    """
    Raises:
        CheckpointError: no such directory, or one that was not finished, or is damaged.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory. Check checkpoint.load.")
    path = directory / "position.json"
    if (directory / DONE).is_file() and not path.is_file():
        raise CheckpointError(f"{path}: missing. The checkpoint is damaged: copy it again.")
    if is_mcore(directory) and not path.is_file():
        raise CheckpointError(
            f"{directory}: holds weights and no optimizer, so no run can go on from it. To start a "
            f"run with these weights set student.hf_path to it, and not checkpoint.load."
        )
    if not (directory / DONE).is_file():
        raise CheckpointError(
            f"{directory}: the checkpoint was never finished (no {DONE} in it). "
            f"Load an earlier one."
        )
    try:
        return Position(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). It is damaged, or of a newer version."
        ) from None


def verify(directory: Path, context: ParallelContext) -> list[str]:
    """What is wrong with the content of its files, on every rank. Collective: each rank reads a
    part of them."""
    sums = read_sums(directory) or {}
    names = sorted(sums, key=lambda name: (-sums[name].num_bytes, name))
    own = names[context.layout.rank :: context.layout.world_size]
    every: list = [None] * context.layout.world_size
    found = problems_of(directory, {name: sums[name] for name in own}, own)
    dist.all_gather_object(every, found, group=context.cpu_group)
    return sorted(problem for problems in every for problem in problems)


def load(directory: Path, student: Trainable, context: ParallelContext) -> Position:
    """Fill student and optimizer from a checkpoint of any layout. Collective.

    Raises:
        CheckpointError: missing, unfinished, damaged, or of another model.
    """
    position = read_position(directory)
    same_layout = position.layout == _sizes(context)
    # Adam has no moments before its first step, and Megatron describes only what exists. A step on
    # zero gradients makes them; everything it touches is overwritten below.
    for chunk in student.wrapped:
        chunk.zero_grad_buffer()
    student.optimizer.step()
    state = _sharded_state(student, context, is_loading=True, with_rng=same_layout)
    with loading_errors(directory):
        loaded = dist_checkpointing.load(state, str(directory))
    for name, chunk in _chunks_by_name(student):
        chunk.load_state_dict(loaded[name])
    _load_optimizer(student.optimizer, loaded["optimizer"])
    if same_layout:
        _restore_rng(loaded["rng"])
    return position


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    chained = optimizer.chained_optimizers
    if len(chained) == 1:
        _load_distributed(chained[0], state)
        return
    for number, distributed in enumerate(chained):  # dense layers, and experts
        _load_distributed(distributed, state[number])


def _load_distributed(distributed: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Groups and step count first, moments and master weights second.

    In one go, Megatron-Core (0.16 and 0.19) looks for torch Adam's step counter among the sharded
    tensors, where it put none, and dies of a KeyError; apex and TransformerEngine keep no such
    counter. So it is set aside while the tensors are copied. Megatron-Core also gives all
    parameters one and the same counter, which each parameter's update would then advance.
    """
    # The run's own options: a changed training.lr or adam_beta2 holds from here on.
    groups = distributed.param_groups
    options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    for group in state["optimizer"]["param_groups"]:
        # 0.19 finds the saved group of a parameter by these two: all groups share them.
        group |= {name: options[0][name] for name in ("max_lr", "min_lr") if name in group}
    tensors = state.pop("param_state")
    assert state.pop("param_state_sharding_type") == "fully_reshardable"
    distributed.load_state_dict(state)
    states = distributed.optimizer.state.values()
    steps = [s.pop("step", None) for s in states]
    distributed.load_parameter_state_from_fully_reshardable(tensors)
    for s, step in zip(states, steps, strict=True):
        if step is not None:
            s["step"] = step.clone()
    for group, own in zip(distributed.param_groups, options, strict=True):
        group.update(own)


def make_position(
    iteration: int, seed: int, prompts_digest: str, context: ParallelContext, **more: Any
) -> Position:
    """`more`: fields of Position that have defaults."""
    return Position(iteration, seed, prompts_digest, _sizes(context), **more)


def _sizes(context: ParallelContext) -> dict[str, int]:
    layout = context.layout
    sizes = {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "cp": layout.cp}
    return sizes | {"vpp": layout.vpp, "ep": layout.ep, "expert_tp": layout.expert_tp}


def _sharded_state(
    student: Trainable, context: ParallelContext, *, is_loading: bool, with_rng: bool
) -> dict[str, Any]:
    chunks = {name: chunk.sharded_state_dict() for name, chunk in _chunks_by_name(student)}
    # Megatron describes the optimizer by one chunk's state, or by those of all under their names.
    state = {
        **chunks,
        "optimizer": student.optimizer.sharded_state_dict(
            chunks.get("model", chunks), is_loading=is_loading, metadata=_OPTIMIZER_FORMAT
        ),
    }
    if with_rng:
        world, rank = context.layout.world_size, context.layout.rank
        state["rng"] = ShardedObject("rng", _rng_state(), (world,), (rank,))
    return state


def _chunks_by_name(student: Trainable) -> list[tuple[str, CausalLM]]:
    """As Megatron-LM names them in a checkpoint's state."""
    if len(student.chunks) == 1:
        return [("model", student.chunks[0])]
    return [(f"model{n}", chunk) for n, chunk in enumerate(student.chunks)]


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["megatron"])
