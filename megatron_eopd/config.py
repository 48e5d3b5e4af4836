"""Every option of a run. In: a TOML file and `section.key=value` overrides. Out: a frozen Config.

An option exists once, here, with its docstring, its default and its check; the code reads
`config.section.key` and nothing else. Model shapes are not options: they come from the Hugging
Face config.json of the model. Options that Megatron-Core has carry Megatron's names.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from megatron_eopd.errors import ConfigError
from megatron_eopd.presets import PRESETS, Parts

BUILT_IN_TASKS = ("countdown",)


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _none_unsets(cls, value: Any, info: ValidationInfo) -> Any:
        """The word none unsets an option, except where it is one of the option's own values."""
        annotation = cls.model_fields[info.field_name].annotation
        return None if value == "none" and "none" not in _words_of(annotation) else value


def _words_of(annotation: Any) -> set[Any]:
    """The values of every Literal in a type."""
    words = set()
    for part in get_args(annotation):
        words |= _words_of(part) if get_args(part) else {part}
    return words


class StudentConfig(Section):
    hf_path: Path
    """Directory of the student, Hugging Face's or a Megatron checkpoint that tools/convert_hf.py or
    a run wrote; its config.json gives the architecture."""
    tokenizer: Path | None = None
    """A SentencePiece model file, or the directory of a Hugging Face tokenizer. Default:
    `hf_path`."""


class ParallelSizes(Section):
    """How one model is cut; the ranks that are left over hold copies of it (data parallelism)."""

    tensor_model_parallel_size: int = Field(1, gt=0)
    """Ranks that share every layer; divides attention heads and key/value heads."""
    pipeline_model_parallel_size: int = Field(1, gt=0)
    """Pipeline stages; divides the layers of the model."""
    expert_model_parallel_size: int = Field(1, gt=0)
    """Parts that the experts of a layer are dealt out to, over the ranks of a pipeline stage."""
    expert_tensor_parallel_size: int = Field(1, gt=0)
    """Ranks that share one expert."""
    sequence_parallel: bool = False
    """Shard the sequence over the tensor-parallel ranks between the parallel layers."""

    def sizes_alone(self) -> "ParallelSizes":
        """Without what only a student has."""
        return ParallelSizes(**{name: getattr(self, name) for name in ParallelSizes.model_fields})


class TeacherConfig(Section):
    hf_path: Path
    """Directory of the frozen teacher, like the student's. Must share its token vocabulary."""
    tokenizer: Path | None = None
    """As `student.tokenizer`, to check that both give every token the same id. Default:
    `hf_path`."""
    eos_token_map: dict[str, str] = {}
    """Student's token → teacher's token, as text: the two swap their places in the teacher's
    distribution. Needed where the models end an answer differently, as with a base student and an
    instruct teacher, `{ "<|endoftext|>" = "<|im_end|>" }`."""
    placement: Literal["colocated", "separate"] = "colocated"
    """`colocated`: on the student's ranks. `separate`: on `world_size` ranks of its own, behind the
    student's in the same torchrun world."""
    world_size: int | None = Field(None, gt=0)
    """Ranks of a `separate` teacher."""
    payload: Literal["hidden", "logits", "topk"] = "hidden"
    """What the teacher hands over. `hidden`: last hidden states, projected by the teacher's LM head
    on the student's last pipeline stage; exact, and 2·H bytes per token in bf16. `logits`: its
    vocab-parallel logits, a few microbatches at a time; exact, and 2·V bytes. `topk`: the
    `objective.top_k` most probable tokens, with exact entropy and tail; 12·k bytes."""
    microbatches_per_exchange: int | None = Field(None, gt=0)
    """Student microbatches that are scored, handed over and trained on at a time. Default: those of
    a whole optimizer step; with `logits`, as many as the student has pipeline stages."""
    offload: bool = False
    """Keep a `colocated` teacher's weights in host memory while it has nothing to score (GPU)."""
    dtype: Literal["float32", "bfloat16", "as_model"] = "as_model"
    """Type of the teacher's parameters and activations. `as_model`: that of `model.dtype`."""
    parallel: ParallelSizes | None = None
    """The teacher's own layout. Default: the student's tensor, pipeline and expert sizes."""

    @model_validator(mode="after")
    def _fits_its_placement(self) -> "TeacherConfig":
        if (self.placement == "separate") != (self.world_size is not None):
            raise ValueError(
                f"placement={self.placement} with world_size={self.world_size}. Set world_size to "
                f"the number of ranks of a separate teacher, and leave it out of a colocated one."
            )
        if self.offload and self.placement == "separate":
            raise ValueError(
                "offload=true makes room for a student on the same ranks, and placement=separate "
                "has none. Set offload=false."
            )
        return self


class ParallelConfig(ParallelSizes):
    virtual_pipeline_model_parallel_size: int = Field(1, gt=0)
    """Model chunks of the student on each pipeline stage; above 1 they run interleaved."""
    context_parallel_size: int = Field(1, gt=0)
    """Ranks that share each of the student's sequences."""
    distributed_timeout_minutes: float = Field(10.0, gt=0)
    """No collective waits longer than this for a missing rank."""


class ModelConfig(Section):
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer specification. `auto`: TransformerEngine where it can be imported and a GPU is
    present, else `local`, which is Megatron's own layers with PyTorch attention."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and activations of student and teacher. With bfloat16 the optimizer keeps
    float32 master weights and moments."""
    make_vocab_size_divisible_by: int = Field(128, gt=0)
    """The vocabulary is padded to a multiple of this times `tensor_model_parallel_size`; padded
    columns never enter a softmax."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Activation recomputation of the student: of the core attention, or of whole layers."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Of `full`: all layers in groups of `recompute_num_layers`, or only that many of a stage."""
    recompute_num_layers: int = Field(1, gt=0)
    """See `recompute_method`."""


class DataConfig(Section):
    prompts: str = "countdown"
    """A jsonl file with `{"prompt": …, "answer": …}` a line, or a built-in task: `countdown`."""
    apply_chat_template: bool = False
    """Wrap each prompt as a user turn of the student tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, as a table or one by one, for Qwen3
    `data.chat_template_kwargs.enable_thinking=false`. A name that the template does not read is an
    error."""
    prompt_suffix: str = ""
    """Appended to every prompt, before the chat template. In double quotes TOML wants `\\\\boxed`;
    in single quotes it takes `\\boxed`, and no `\\n`."""
    max_prompt_length: int = Field(1024, gt=0)
    """In tokens; a longer prompt is an error that names its line."""
    shuffle: bool = True
    """Draw prompts in a seeded random order, anew each epoch."""
    response_key: str | None = None
    """Key under which a line of `prompts` holds a reference answer, or a list of several, for
    `rollout.reference_fraction`. tools/generate.py has a teacher write them."""
    teacher_key: str = "teacher"
    """Key under which a line of `prompts` names its teacher, one of `[teachers.NAME]`. A line
    without it has the one of `[teacher]`."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _has_a_template(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and not info.data.get("apply_chat_template"):
            raise ValueError(
                "would be ignored with data.apply_chat_template=false. Set it to true."
            )
        return value

    @field_validator("prompt_suffix")
    @classmethod
    def _is_what_was_meant(cls, value: str) -> str:
        # In double quotes "\boxed" is a backspace and "oxed" to TOML, "\text" a tab and "ext".
        control = [c for c in value if ord(c) < 32 and c != "\n"]
        if control:
            raise ValueError(
                f"holds the control character {control[0]!r}. Write each backslash twice, or put "
                f"the text in single quotes."
            )
        return value


class RolloutConfig(Section):
    engine: Literal["auto", "vllm", "megatron"] = "auto"
    """`vllm`; `megatron`, the exact but slow reference sampler inside the trainer; `auto`: vllm
    where it is installed, else megatron for responses of up to `max_fallback_length`."""
    batch_size: int = Field(128, gt=0)
    """Samples per iteration: prompts × samples_per_prompt."""
    samples_per_prompt: int = Field(1, gt=0)
    """Responses drawn for each prompt of the batch."""
    temperature: float = Field(1.0, gt=0, le=2)
    """Sampling temperature, at most 2. The loss divides both models' logits by it as well."""
    max_response_length: int = Field(4096, gt=0)
    """In tokens; a response that reaches it is cut and counted as truncated."""
    max_fallback_length: int = Field(256, gt=0)
    """The trainer's sampler computes a whole sequence anew for every token. Where nobody asked for
    it, because vLLM is not installed or `replay` starts none, a longer `max_response_length` is an
    error."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a response, of student and teacher. Default: eos_token_id of each model's
    generation_config.json, config.json or tokenizer, which must agree."""
    replay: Path | None = None
    """Folder of recorded rollouts to train on instead of generating."""
    record: bool = False
    """Keep every iteration's rollouts under RUN_DIR/rollouts/, ready to be replayed."""
    tensor_model_parallel_size: int = Field(1, gt=0)
    """Tensor-parallel size of the vLLM engine, independent of the trainer's."""
    dtype: Literal["float32", "bfloat16", "as_model"] = "as_model"
    """Type of vLLM's weights and activations."""
    max_num_seqs: int = Field(256, gt=0)
    """Most sequences vLLM runs at once."""
    kv_cache_gib: float = Field(4.0, gt=0)
    """Memory of vLLM's key/value cache, in GiB."""
    num_threads: int = Field(1, gt=0)
    """CPU threads of a vLLM worker; ignored on GPU."""
    visible_devices: str = ""
    """CUDA_VISIBLE_DEVICES of vLLM's process, e.g. "4,5,6,7", for GPUs of its own; weights then go
    there over NCCL. Empty: the trainer's GPUs, and weights go through host memory, because NCCL
    does not join two processes on one GPU."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Longest wait, in seconds, for the engine process to become ready."""
    generate_timeout_s: float = Field(1800.0, gt=0)
    """Longest wait, in seconds, for the rollouts of one iteration."""
    reference_fraction: float = Field(0.0, ge=0, le=1)
    """Share of an iteration's prompts whose reference answers (`data.response_key`) are trained on
    instead of samples, 1 − λ of GKD: off-policy distillation. At 1, from first to last, it is
    classical knowledge distillation, and no engine is started unless an evaluation wants one."""
    final_reference_fraction: float | None = Field(None, ge=0, le=1)
    """`reference_fraction` at the end of its schedule, e.g. from 1 to 0 to warm a student up on
    references and go over to its own samples. Default: it does not move."""
    reference_schedule: Literal["linear", "cosine"] = "linear"
    """How `reference_fraction` goes to its final value."""
    reference_schedule_iters: int | None = Field(None, gt=0)
    """Iterations until it is there. Default: all of the run."""
    mismatch_warn_factor: float = Field(3.0, gt=1)
    """A warning is told, once, when the mean of exp|Δ| − 1, Δ being the difference between the
    engine's and the trainer's log-probability of a sampled token, passes this many times that of
    the first iteration (which counts as 0.001 in float32 and 0.1 in bfloat16 at least)."""

    @property
    def uses_references(self) -> bool:
        return max(self.reference_fraction, self.final_reference_fraction or 0.0) > 0

    @property
    def ever_samples(self) -> bool:
        """Whether any iteration needs responses of the student's own."""
        last = self.final_reference_fraction
        return min(self.reference_fraction, 1.0 if last is None else last) < 1


class WeightSyncConfig(Section):
    host: str = "127.0.0.1"
    """Address at which the engine reaches the pipeline-stage leaders on its own host, which is rank
    0's; leaders on other hosts are reached under their host names."""
    port: int = Field(0, ge=0, le=65535)
    """First TCP port of the transfer groups, one per pipeline stage; 0 takes free ones."""
    bucket_mib: float = Field(64.0, gt=0)
    """Tensors are gathered and sent in buckets of about this many MiB; one is packed while another
    is loaded."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest wait, in seconds, for one weight sync."""
    verify: bool = True
    """After each sync, compare the engine's log-probabilities of likely tokens, of real prompts and
    of the newest responses, with the trainer's. Their mean difference is the metric
    `weight_sync/probe_difference`; the two factors below are multiples of the rounding that engine
    and trainer were measured to have at the first sync, at least 3e-5 nats in float32 and 0.03 in
    bfloat16."""
    probe_min_probability: float = Field(0.1, gt=0, lt=1)
    """Tokens that the trainer gives less are not compared: rounding grows with their rarity."""
    probe_warn_factor: float = Field(3.0, gt=1)
    """A mean difference of so many times the rounding is told."""
    probe_stop_factor: float = Field(10.0, gt=1)
    """A mean difference of so many times the rounding stops the run, after metrics and checkpoint
    are written."""

    @model_validator(mode="after")
    def _warns_before_it_stops(self) -> "WeightSyncConfig":
        if self.probe_warn_factor > self.probe_stop_factor:
            raise ValueError(
                f"probe_warn_factor={self.probe_warn_factor:g} is above probe_stop_factor="
                f"{self.probe_stop_factor:g}. Set it to {self.probe_stop_factor:g} or less."
            )
        return self


class ObjectiveConfig(Section):
    name: Literal[
        "eopd",
        "eopd_paper",
        "eopd_mix",
        "opd",
        "opd_sampled",
        "vopd",
        "fkl",
        "fixed_mix",
        "jsd",
        "skewed_kl",
        "skewed_reverse_kl",
    ] = "eopd"
    """Preset; docs/objectives.md has the formulas. `eopd`: reverse KL + α · 1[H ≥ τ] · forward KL,
    exact over the full vocabulary; `eopd_paper`: the same with the paper's sampled and top-k
    estimators; `eopd_mix`: (1 − λ) · reverse + λ · forward KL, λ = α · sigmoid((H − τ)/width);
    `opd`, `opd_sampled`, `vopd`: reverse KL only; `fkl`: forward KL only; `fixed_mix`: (1 − α) ·
    reverse + α · forward KL; `jsd`: generalised Jensen-Shannon; `skewed_kl`, `skewed_reverse_kl`:
    KL to a mixture of both models. The next five options replace single parts of it."""
    reverse_kl: Literal["full", "sampled", "vopd", "topk", "skewed", "none"] | None = None
    """Estimator of KL(student ‖ teacher). `full`: exact; `sampled`: clipped surrogate on the
    sampled token; `vopd`: the same with a control variate; `topk`; `skewed`. Default: the
    preset's."""
    forward_kl: Literal["full", "topk", "skewed", "jsd", "none"] | None = None
    """Estimator of KL(teacher ‖ student), or `jsd` in its place. Default: the preset's."""
    gate: Literal["hard", "sigmoid", "quantile", "always", "never"] | None = None
    """When forward KL joins. `hard`: H ≥ entropy_threshold; `sigmoid`: gradually around it;
    `quantile`: for the tokens of the step whose H is at or above its `gate_quantile`. Default: the
    preset's."""
    combine: Literal["add", "interpolate"] | None = None
    """`add`: reverse + α · gate · forward; `interpolate`: (1 − α · gate) · reverse + α · gate ·
    forward. Default: the preset's."""
    forward_kl_weight: float | None = Field(None, ge=0)
    """α, the weight of forward KL where the gate is open. Default: 0.5 for `fixed_mix`, else 1."""
    entropy_threshold: float = 0.8
    """τ: teacher entropy, in nats, at or above which forward KL joins the loss."""
    final_forward_kl_weight: float | None = Field(None, ge=0)
    """α at the end of the schedule. Default: α does not move."""
    final_entropy_threshold: float | None = None
    """τ at the end of the schedule. Default: τ does not move."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How α and τ go to their final values."""
    schedule_steps: int | None = Field(None, gt=0)
    """Optimizer steps until they are there. Default: all of the run."""
    gate_width: float = Field(0.1, gt=0)
    """Of the `sigmoid` gate, in nats: half a width from τ it is open to 38 % or 62 %."""
    gate_quantile: float = Field(0.8, ge=0, le=1)
    """Of the `quantile` gate: share of the tokens of an optimizer step that stay closed. Costs one
    more pass of the teacher's LM head."""
    clip_ratio: float = Field(0.2, gt=0, lt=1)
    """ε of the `sampled` and `vopd` estimators: ratios outside [1 − ε, 1 + ε] are clipped."""
    top_k: int = Field(16, gt=0)
    """Tokens in the support of `topk` estimators and of the topk/* metrics."""
    top_k_support: Literal["teacher", "student", "union"] = "teacher"
    """Whose most probable tokens the support has. Other than the teacher's costs one more pass over
    the student's logits."""
    top_k_normalization: Literal["teacher", "student", "both", "neither", "tail"] = "teacher"
    """Which side is renormalised on the support; `tail`: none, and a bucket holds the rest."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """β of `jsd`: weight of the teacher in the mixture, and of KL(teacher ‖ mixture)."""
    skew: float = Field(0.1, gt=0, lt=1)
    """λ of `skewed`: weight of the first model in KL(first ‖ λ · first + (1 − λ) · second)."""
    token_weight: Literal["uniform", "position"] = "uniform"
    """`position`: tokens weigh 0.25 at the start of a response and about 1 from 60 % of it on."""
    ignored_token_ids: tuple[int, ...] = ()
    """Sampled tokens that have no loss. They still count as valid tokens in every mean."""
    student_temperature: float | None = Field(None, gt=0)
    """Divides the student's logits in the loss. Default: the rollout temperature."""
    teacher_temperature: float | None = Field(None, gt=0)
    """Divides the teacher's logits in the loss. Default: the rollout temperature."""
    head: Literal["materialized", "chunked"] = "materialized"
    """`chunked`: LM heads, loss and gradient go chunk by chunk of tokens, so that the logits of a
    microbatch never exist at once. Saves memory, not time."""
    head_chunk_size: int | None = Field(None, gt=0)
    """Tokens per chunk of the `chunked` head. Default: 4096 on GPU, 256 on CPU."""
    inplace_backward: bool = False
    """Write the gradient over the student's logits, which saves a tensor of their size. The
    `chunked` head does so anyway where it can."""

    def chunk_size(self, on_gpu: bool) -> int:
        """Tokens per chunk of the chunked head."""
        # On a GPU smaller chunks would spend their time on the weight gradient's float32 sum.
        return self.head_chunk_size or (4096 if on_gpu else 256)

    @property
    def overwrites_logits(self) -> bool:
        """Whether the gradient is written over the student's logits."""
        chunked = self.head == "chunked" and not self.parts.reads_logits_again
        return chunked or self.inplace_backward

    @property
    def parts(self) -> Parts:
        """The preset's, with those that were set by their own option."""
        own = {part.name: getattr(self, part.name) for part in fields(Parts)}
        set_ones = {name: value for name, value in own.items() if value is not None}
        return replace(PRESETS[self.name], **set_ones)

    @model_validator(mode="after")
    def _parts_fit(self) -> "ObjectiveConfig":
        parts = self.parts
        weights = (parts.forward_kl_weight, self.final_forward_kl_weight or 0.0)
        if parts.combine == "interpolate" and max(weights) > 1:
            raise ValueError(
                f"forward_kl_weight={weights[0]} (final {self.final_forward_kl_weight}) with "
                f"combine=interpolate would give reverse KL the weight 1 − {max(weights)} < 0. Set "
                f"weights of at most 1, or combine=add."
            )
        if parts.reverse_kl == "none" and (parts.forward_kl == "none" or parts.gate == "never"):
            raise ValueError(
                f"reverse_kl={parts.reverse_kl}, forward_kl={parts.forward_kl}, gate={parts.gate} "
                f"leave nothing to minimise. Set reverse_kl=full, or forward_kl=full and "
                f"gate=always."
            )
        if parts.forward_kl == "none" and parts.combine == "interpolate":
            raise ValueError(
                "combine=interpolate needs two terms, but forward_kl=none. Set combine=add."
            )
        if self.inplace_backward and parts.reads_logits_again:
            raise ValueError(
                f"inplace_backward=true overwrites logits that reverse_kl={parts.reverse_kl} or "
                f"forward_kl={parts.forward_kl} reads once more. Set inplace_backward=false."
            )
        return self


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
    """Shape of the decay from `lr` to `min_lr`, over all optimizer steps."""
    lr_warmup_iters: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up from 0."""
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
    load: Path | None = None
    """Checkpoint directory to start from, …/checkpoints/000120. Default: the newest of RUN_DIR."""
    export_hf: bool = True
    """Write the student as a Hugging Face directory, RUN_DIR/hf, after the last iteration."""


class EvaluationConfig(Section):
    interval: int = Field(50, ge=0)
    """Iterations between evaluations, beside the ones before the first and after the last; 0: only
    those two."""
    task: Literal["countdown"] | None = None
    """Held-out problems of a built-in task and their grader. With neither this nor `prompts`
    nothing is evaluated."""
    prompts: Path | None = None
    """Held-out problems of your own, a jsonl file like `data.prompts`: a response is right when its
    last number is that of `answer`. Figures are named after the file, eval/<file>/…."""
    num_problems: int = Field(200, gt=0)
    """Problems taken from the start of the held-out set."""
    samples_per_problem: int = Field(16, gt=0)
    """Responses per problem, drawn at the rollout temperature; bounds the k of pass@k."""

    @property
    def name(self) -> str | None:
        """Of the held-out set; None evaluates nothing."""
        return self.prompts.stem if self.prompts is not None else self.task

    @model_validator(mode="after")
    def _has_one_set(self) -> "EvaluationConfig":
        if self.task is not None and self.prompts is not None:
            raise ValueError(
                f"task={self.task} and prompts={self.prompts} are two held-out sets. Set one of "
                f"the two to none."
            )
        return self


class LoggingConfig(Section):
    log_interval: int = Field(1, gt=0)
    """Iterations between step lines on the terminal. metrics.jsonl has every iteration."""
    text_interval: int = Field(10, gt=0)
    """Iterations between rollouts shown as text in TensorBoard; evaluations always show some."""
    text_samples: int = Field(4, ge=0)
    """How many are shown."""


class Config(Section):
    run_dir: Path
    """Everything the run writes. The same command again resumes from its newest checkpoint."""
    seed: int = 1234
    """Fixes prompt order, sampling and any random initialisation."""
    student: StudentConfig
    teacher: TeacherConfig
    teachers: dict[str, TeacherConfig] = {}
    """More teachers, by name, for prompts that ask for them: `[teachers.NAME]` has the options of
    `[teacher]`."""
    parallel: ParallelConfig = ParallelConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    _missing_inputs: tuple[str, ...] = PrivateAttr(())

    def check_inputs_exist(self) -> None:
        """
        Raises:
            ConfigError: a relative path in the file that was found nowhere; says where it was
                looked for.
        """
        if self._missing_inputs:
            raise ConfigError("\n".join(self._missing_inputs))

    @property
    def optimizer_steps_per_iteration(self) -> int:
        return self.rollout.batch_size // self.training.global_batch_size

    @property
    def optimizer_steps(self) -> int:
        """Of the whole run."""
        return self.training.train_iters * self.optimizer_steps_per_iteration

    @property
    def longest_wait_s(self) -> float:
        """The longest that the ranks may have to wait for one engine call, in seconds."""
        rollout = self.rollout
        return rollout.start_timeout_s + rollout.generate_timeout_s + self.weight_sync.timeout_s

    @property
    def student_temperature(self) -> float:
        return self.objective.student_temperature or self.rollout.temperature

    @property
    def teacher_temperature(self) -> float:
        return self.objective.teacher_temperature or self.rollout.temperature

    @model_validator(mode="after")
    def _batches_divide(self) -> "Config":
        rollout, training = self.rollout, self.training
        if rollout.batch_size % rollout.samples_per_prompt:
            raise ValueError(
                f"rollout.batch_size={rollout.batch_size} counts samples, and is not a multiple of "
                f"rollout.samples_per_prompt={rollout.samples_per_prompt}. Set "
                f"rollout.batch_size={_multiple(rollout.batch_size, rollout.samples_per_prompt)}."
            )
        if rollout.batch_size % training.global_batch_size:
            raise ValueError(
                f"rollout.batch_size={rollout.batch_size} is not a multiple of "
                f"training.global_batch_size={training.global_batch_size}, so the last optimizer "
                f"step of an iteration would be short. Set rollout.batch_size="
                f"{_multiple(rollout.batch_size, training.global_batch_size)}."
            )
        self._check_references()
        reverse_kl, student = self.objective.parts.reverse_kl, self.student_temperature
        if reverse_kl in ("sampled", "vopd") and student != rollout.temperature:
            raise ValueError(
                f"objective.reverse_kl={reverse_kl} compares the student at "
                f"objective.student_temperature={student} with the engine's log-probabilities at "
                f"rollout.temperature={rollout.temperature}. Set both to the same value."
            )
        return self

    def _check_references(self) -> None:
        rollout = self.rollout
        schedule = (rollout.reference_schedule, rollout.reference_schedule_iters)
        if rollout.final_reference_fraction is None and schedule != ("linear", None):
            raise ValueError(
                f"rollout.reference_schedule={schedule[0]} and rollout.reference_schedule_iters="
                f"{schedule[1]} would be ignored without rollout.final_reference_fraction. Set it, "
                f"or leave them out."
            )
        if not rollout.uses_references or rollout.replay is not None:
            return
        fractions = (
            f"rollout.reference_fraction={rollout.reference_fraction:g} (final "
            f"{rollout.final_reference_fraction})"
        )
        if self.data.prompts in BUILT_IN_TASKS:
            raise ValueError(
                f"{fractions} trains on reference answers, and data.prompts={self.data.prompts} "
                f"has none. Set data.prompts to a file that has, or the fractions to 0."
            )
        if self.data.response_key is None:
            raise ValueError(
                f"{fractions} trains on reference answers, and data.response_key does not say "
                f"which key of {self.data.prompts} holds them."
            )
        if self.objective.parts.needs_sampled_tokens:
            raise ValueError(
                f"objective.reverse_kl={self.objective.parts.reverse_kl} needs tokens that the "
                f"student sampled, and {fractions} brings others. Set objective.reverse_kl=full, "
                f"or the fractions to 0."
            )

    @model_validator(mode="after")
    def _layouts_fit(self) -> "Config":
        parallel = self.parallel
        own = [
            (f"{where}.parallel", t.parallel)
            for where, t in self.all_teachers.items()
            if t.parallel
        ]
        for where, sizes in [("parallel", parallel), *own]:
            if sizes.sequence_parallel and sizes.tensor_model_parallel_size == 1:
                raise ValueError(
                    f"{where}.sequence_parallel=true needs {where}.tensor_model_parallel_size > 1; "
                    f"it is 1. Set {where}.sequence_parallel=false."
                )
        chunks, stages = (
            parallel.virtual_pipeline_model_parallel_size,
            parallel.pipeline_model_parallel_size,
        )
        if chunks > 1 and stages == 1:
            raise ValueError(
                f"parallel.virtual_pipeline_model_parallel_size={chunks} interleaves the chunks of "
                f"pipeline stages, and parallel.pipeline_model_parallel_size is 1. Set it above 1."
            )
        return self

    @field_validator("teachers")
    @classmethod
    def _have_names_of_their_own(cls, value: dict[str, TeacherConfig]) -> dict[str, TeacherConfig]:
        if "teacher" in value:
            raise ValueError("a teacher named teacher is the one of [teacher]. Name it otherwise.")
        return value

    @model_validator(mode="after")
    def _payload_fits(self) -> "Config":
        payloads = {t.payload for t in self.all_teachers.values()}
        if len(payloads) > 1:
            raise ValueError(
                f"teachers with different payloads {sorted(payloads)}: one objective would mean "
                f"different things for them. Set the same payload for all."
            )
        ignored = [n for n, t in self.teachers.items() if t.microbatches_per_exchange is not None]
        if ignored:
            raise ValueError(
                f"teachers.{ignored[0]}.microbatches_per_exchange would be ignored: all teachers "
                f"hand over the same portions. Set teacher.microbatches_per_exchange."
            )
        objective = self.objective
        if objective.parts.gate == "quantile" and self.exchange_size is not None:
            raise ValueError(
                f"objective.gate=quantile needs the entropies of a whole optimizer step before its "
                f"first microbatch, and teacher.payload={self.teacher.payload} with "
                f"teacher.microbatches_per_exchange={self.teacher.microbatches_per_exchange} hands "
                f"over {self.exchange_size} of each rank's microbatches at a time. Set "
                f"teacher.payload=hidden or topk, and teacher.microbatches_per_exchange=none."
            )
        if payloads == {"topk"}:
            _check_top_k_payload(objective)
        return self

    @property
    def exchange_size(self) -> int | None:
        """Microbatches of each data-parallel rank that teachers hand over at a time; None: those
        of an optimizer step. The interleaved schedule takes whole groups of them."""
        parallel = self.parallel
        stages = parallel.pipeline_model_parallel_size
        size = self.teacher.microbatches_per_exchange
        if size is None and self.teacher.payload == "logits":
            size = stages
        if size is not None and parallel.virtual_pipeline_model_parallel_size > 1:
            size = _multiple(size, stages)
        return size

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """By the names of their sections, the one of `[teacher]` first."""
        more = {f"teachers.{name}": teacher for name, teacher in self.teachers.items()}
        return {"teacher": self.teacher, **more}

    @property
    def coarsest_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of trainer and engine: what their log-probabilities can agree to."""
        dtypes = {self.model.dtype, self.dtype_of(self.rollout)}
        return "bfloat16" if "bfloat16" in dtypes else "float32"

    def dtype_of(self, part: "TeacherConfig | RolloutConfig") -> str:
        """Of a teacher's or the engine's weights and activations."""
        return self.model.dtype if part.dtype == "as_model" else part.dtype


def _check_top_k_payload(objective: ObjectiveConfig) -> None:
    """What needs the teacher's whole distribution cannot be had from its top k."""
    parts = objective.parts
    for option, value, possible in (
        ("reverse_kl", parts.reverse_kl, ("topk", "sampled", "none")),
        ("forward_kl", parts.forward_kl, ("topk", "none")),
        ("top_k_support", objective.top_k_support, ("teacher",)),
    ):
        if value not in possible:
            raise ValueError(
                f"teacher.payload=topk holds objective.top_k={objective.top_k} tokens of each "
                f"distribution, and objective.{option}={value} needs all of them. Set "
                f"objective.{option} to {' or '.join(possible)}, objective.name=eopd_paper, or "
                f"teacher.payload=hidden."
            )


def _multiple(value: int, of: int) -> int:
    """The smallest multiple of `of` that is not below `value`."""
    return -(-value // of) * of


def load_config(toml_path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides on top, in order.

    A relative path in the file means the file's own directory if it exists there, else the working
    directory, as it always does on the command line and for `run_dir`.

    Raises:
        ConfigError: naming the option, the value, and what would be right.
    """
    try:
        tree = tomllib.loads(Path(toml_path).read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{toml_path}: no such file. Give the path of a TOML configuration."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{toml_path}: not valid TOML: {error}") from None
    missing = _resolve_paths(tree, Path(toml_path).parent)
    for override in overrides:
        _apply_override(tree, override)
        missing.pop(override.partition("=")[0], None)  # the command line names another
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, toml_path)) from None
    config._missing_inputs = tuple(missing.values())
    return config


def _resolve_paths(tree: dict[str, Any], directory: Path) -> dict[str, str]:
    """Point what the file names, and has beside it, there. Returns what is to be said of each
    option whose relative path exists neither there nor in the working directory."""
    missing = {}
    for option in _input_paths(tree):
        where, _, key = option.rpartition(".")
        section = _section(tree, where)
        value = section.get(key)
        if not isinstance(value, str) or value in ("", "none", *BUILT_IN_TASKS):
            continue
        beside = directory / value  # an absolute value stays what it is
        if beside.exists():
            section[key] = str(beside)
        elif not Path(value).is_absolute() and not Path(value).exists():
            missing[option] = (
                f"{option}={value}: no such file or directory. Looked for {beside.absolute()} and "
                f"{Path(value).absolute()}."
            )
    return missing


def _input_paths(tree: dict[str, Any]) -> list[str]:
    """The options that name something to read."""
    teachers = tree.get("teachers")
    names = list(teachers) if isinstance(teachers, dict) else []
    models = ["student", "teacher", *(f"teachers.{name}" for name in names)]
    files = ["data.prompts", "evaluation.prompts", "rollout.replay", "checkpoint.load"]
    return [f"{model}.{key}" for model in models for key in ("hf_path", "tokenizer")] + files


def _section(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """The table of this name; an empty one where there is none, or something else."""
    for name in where.split("."):
        tree = tree.get(name)
        if not isinstance(tree, dict):
            return {}
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r} has no '='. Write section.key=value.")
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section!r} is an option, not a section.")
    tree[key] = parse_value(text)


def parse_value(text: str) -> Any:
    """TOML's own reading of the value; a bare word is a string, so paths need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError, toml_path: Path) -> str:
    lines = [f"{toml_path}: the configuration is not valid."]
    options = {option for option, _, _ in describe_options()}
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {name}: unknown option. {_suggest(name)}")
        elif problem["type"] == "missing":
            lines.append(f"  {name}: missing. Set it in the file or as {name}=…")
        elif name and name not in options and isinstance(problem["input"], dict):
            # A section, whose options contradict each other.
            lines.append(f"  {name}: {message}")
        elif name:
            lines.append(f"  {name}={problem['input']!r}: {message}")
        else:
            lines.append(f"  {message}")
    return "\n".join(lines)


def _suggest(unknown: str) -> str:
    known = [name for name, _, _ in describe_options()]
    close = difflib.get_close_matches(unknown, known, n=1)
    section = unknown.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == section] or known
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"{hint}Known here: {', '.join(siblings)}."


def changed_options(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`section.key: old → new` of every option that differs between two resolved configurations."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_options(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {before} → {after}")
    return changes


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def describe_options(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple]:
    """(dotted name, default as TOML-like text, docstring) of every option, in file order."""
    for name, field in section.model_fields.items():
        sections = [t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)]
        if sections and field.annotation is not dict[str, TeacherConfig]:
            yield from describe_options(sections[0], f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.default, default=str)
        yield f"{prefix}{name}", default, field.description or ""
