"""Options of the optimizer steps, and of what is kept, measured and shown beside them."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_eopd.config.section import Section


class TrainingConfig(Section):
    train_iters: int = Field(200, ge=0)
    """Iterations: one generation and one weight sync each."""
    global_batch_size: int = Field(32, gt=0)
    """Samples per optimizer step, over all data-parallel ranks; divides `rollout.batch_size`."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Samples that are packed into one forward and backward pass of a rank. Default: 1, or as
    `max_tokens_per_microbatch` says."""
    max_tokens_per_microbatch: int | None = Field(None, gt=0)
    """Instead of `micro_batch_size`: pack as many samples as have this many tokens together. Then
    every data-parallel rank gets the same number of microbatches, balanced by length."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay from `lr` to `min_lr`."""
    lr_decay_iters: int | None = Field(None, gt=0)
    """Iterations until `min_lr`, which holds from there on. Default: all of the run."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up from 0, while the decay goes on."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled (AdamW); norms and biases are exempt."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of Adam's mean of gradients."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of Adam's mean of squared gradients."""
    adam_eps: float = Field(1e-8, gt=0)
    """Added to Adam's root mean square of gradients."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What follows a loss or gradient that is NaN or infinite, after its rollouts were put into
    RUN_DIR/nonfinite: the end of the run, or the next step, with the weights as they were. An
    update that makes such weights always ends the run."""
    max_skipped_steps: int = Field(10, gt=0)
    """Most steps in a row that are skipped, for whichever reason; one more ends the run."""
    skip_grad_norm_factor: float | None = Field(None, gt=1)
    """Skip a step whose gradient norm is above this many times the median of the last
    `skip_grad_norm_window` steps. Default: none is skipped."""
    skip_grad_norm_window: int = Field(128, gt=1)
    """Steps that the median is over; before half as many are known no step is skipped."""
    check_replicas_interval: int = Field(10, ge=0)
    """Optimizer steps between comparisons of the data-parallel ranks' weights, bit by bit; they are
    also compared before each save. 0: never."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs (GPU)."""
    overlap_param_gather: bool = False
    """Gather the updated parameters while the next forward pass runs (GPU); needs
    `overlap_grad_reduce`."""

    @model_validator(mode="after")
    def _options_fit(self) -> "TrainingConfig":
        if self.max_tokens_per_microbatch and self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} would be ignored with "
                f"max_tokens_per_microbatch={self.max_tokens_per_microbatch}. Set one of the two "
                f"to none."
            )
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr={self.min_lr:g} is above lr={self.lr:g}, and the learning rate decays "
                f"from lr to min_lr. Set min_lr={self.lr:g} or less."
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError(
                "overlap_param_gather=true needs overlap_grad_reduce=true; it is false."
            )
        return self


class CheckpointConfig(Section):
    save_interval: int = Field(50, gt=0)
    """Iterations between checkpoints; the last iteration always saves."""
    keep_last: int = Field(3, gt=0)
    """Older complete checkpoints are removed once a newer one is complete."""
    keep_best: str | None = None
    """Also keep the checkpoint with the best value of this figure of an evaluation, such as
    `pass@8`, `reverse_kl` (lower is better of what ends in `_kl` or `fraction`), or, with several
    tasks, `math500/pass@8`."""
    async_save: bool = True
    """Copy a checkpoint into host memory and write it while training goes on."""
    staging_gib: float = Field(16.0, gt=0)
    """Most host memory that a rank may use for such a copy; training waits while a larger one is
    written."""
    save_timeout_minutes: float = Field(60.0, gt=0)
    """A checkpoint that is not written by then ends the run."""
    resume: Literal["auto", "none"] | int = "auto"
    """Of RUN_DIR's own checkpoints: `auto` goes on from the newest, a number from that iteration's,
    and `none` is an error where there are any."""
    load: Path | None = None
    """Checkpoint of another run, …/checkpoints/000120, whose run goes on in this RUN_DIR with
    optimizer and position, while RUN_DIR has none of its own. To start anew from its weights set
    `student.hf_path` to it."""
    exit_grace_seconds: float = Field(25.0, gt=0)
    """How long a run may take to stop after SIGTERM, SIGINT, SIGUSR1 or SIGHUP, the save included.
    What can be finished in it is; the rest is for the resumed run. torchrun kills its ranks 30 s
    after a signal of its own."""
    exit_duration_minutes: float | None = Field(None, gt=0)
    """Save and stop before this time since the job began, by the pace of the last iteration and the
    last save. Default: no limit."""
    export_hf: bool = True
    """Write the student as a Hugging Face directory, RUN_DIR/hf, after the last iteration."""
    export_hf_interval: int = Field(0, ge=0)
    """Checkpoints between further ones, RUN_DIR/hf-000120; 0: none."""


class LoggingConfig(Section):
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """What shows the metrics, beside metrics.jsonl, which is always written. A list, `[]` for no
    tracker. `wandb` and `mlflow` need packages of the extra `trackers`."""
    log_interval: int = Field(1, gt=0)
    """Iterations between step lines on the terminal. metrics.jsonl has every iteration."""
    text_interval: int = Field(10, gt=0)
    """Iterations between rollouts shown as text by the trackers; evaluations always show some."""
    text_samples: int = Field(4, ge=0)
    """How many are shown."""
    record_tokens_interval: int = Field(10, ge=0)
    """Iterations between recordings of what both models say of every token of some responses, in
    RUN_DIR/tokens/, which `python -m megatron_eopd.view` shows; evaluations are recorded as well.
    0: none."""
    record_tokens_samples: int = Field(8, ge=0)
    """Responses in a recording: the first ones, and at most four to a prompt while there are
    others. Costs one more pass over both models' logits of their tokens, and one over the
    student's."""
    record_top_tokens: Literal["notable", "all"] = "notable"
    """At which tokens the five most probable of both models are kept: where the teacher's entropy
    reaches `objective.entropy_threshold` or reverse KL 1 nat, or at all."""

    diagnostics_interval: int = Field(10, ge=0)
    """Iterations between looks at where student and teacher are apart: the metrics overlap/*,
    by_position/* and by_entropy/*, of the iteration's first optimizer step; evaluations always have
    them. Costs one more pass over one model's logits. 0: never."""

    @field_validator("trackers")
    @classmethod
    def _are_different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a tracker twice, which would write everything twice.")
        return value
