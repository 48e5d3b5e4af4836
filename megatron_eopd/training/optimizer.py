"""The student made trainable: Megatron's data parallelism and distributed optimizer.

Parameters and activations may be bfloat16; gradients are reduced in float32, and the optimizer
keeps float32 master weights and moments.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_eopd.config import Config, TrainingConfig
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.models.patches import keep_gradient_norm_on_the_device
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.schedules import Progress, lr_at


@dataclass(frozen=True)
class Trainable:
    """The student and what moves it. `wrapped` are the `chunks` inside DistributedDataParallel."""

    chunks: list[CausalLM]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    training: TrainingConfig

    def set_lr(self, progress: Progress) -> float:
        """Of the next step, and its weight decay; the options hold, whatever a checkpoint had."""
        lr = lr_at(self.training, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.training.weight_decay * group.get("wd_mult", 1.0)
        return lr

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """While a schedule runs that others follow before the step: no reduction of gradients."""
        config = self.chunks[0].config
        if is_last:
            yield
            return
        own_no_sync, config.no_sync_func = config.no_sync_func, nullcontext
        try:
            with ExitStack() as stack:
                for chunk in self.wrapped:
                    stack.enter_context(chunk.no_sync())
                yield
        finally:
            config.no_sync_func = own_no_sync

    def gather_parameters(self) -> None:
        """Have the whole updated parameters here, where the next forward pass would gather them."""
        for chunk in self.wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def make_trainable(chunks: list[CausalLM], config: Config, context: ParallelContext) -> Trainable:
    keep_gradient_norm_on_the_device()
    training = config.training
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(
                # ZeRO 1: each data-parallel rank keeps the optimizer's state of its part alone.
                use_distributed_optimizer=True,
                # A sum over many ranks and microbatches loses low bits in bfloat16.
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=training.overlap_grad_reduce,
                overlap_param_gather=training.overlap_param_gather,
            ),
            chunk,
            # Buckets are there to reduce a part of the gradients while the rest is computed. Of
            # interleaved chunks all but the first are reduced whole, while earlier ones compute.
            disable_bucketing=number > 0,
            pg_collection=context.groups,
        )
        for number, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(_optimizer_config(config), wrapped)
    model_config = chunks[0].config  # all chunks share it
    no_sync = [chunk.no_sync for chunk in wrapped]
    # Megatron's schedules call these: the first around all microbatches but the last, so that
    # gradients are reduced once; the second on each loss (a scale of 1 without float16).
    model_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    model_config.grad_scale_func = optimizer.scale_loss
    return Trainable(chunks, wrapped, optimizer, training)


def _optimizer_config(config: Config) -> OptimizerConfig:
    training = config.training
    return OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        # With 0 Megatron would not even measure the norm; an infinite bound never clips.
        clip_grad=training.clip_grad or math.inf,
        bf16=config.model.dtype == "bfloat16",
        params_dtype=getattr(torch, config.model.dtype),
        use_distributed_optimizer=True,
        overlap_param_gather=training.overlap_param_gather,
    )
