"""Options of the models: which, how each one is cut, and how it computes."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_eopd.config.data import TeacherPromptConfig
from megatron_eopd.config.section import Section


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
    """Pipeline stages; divides the layers of the model, unless the next two say otherwise."""
    decoder_first_pipeline_num_layers: int | None = Field(None, gt=0)
    """Layers of the first pipeline stage, which has the embedding, too. The stages without a number
    of their own share the others equally. Default: all stages alike."""
    decoder_last_pipeline_num_layers: int | None = Field(None, gt=0)
    """Layers of the last pipeline stage, which has the LM heads and the loss, too. See
    `decoder_first_pipeline_num_layers`."""
    expert_model_parallel_size: int = Field(1, gt=0)
    """Parts that the experts of a layer are dealt out to, over the ranks of a pipeline stage."""
    expert_tensor_parallel_size: int = Field(1, gt=0)
    """Ranks that share one expert."""
    sequence_parallel: bool = False
    """Shard the sequence over the tensor-parallel ranks between the parallel layers."""

    def for_other_model(self) -> "ParallelSizes":
        """Without what only a student has, and numbers of layers, which mean one model alone."""
        sizes = {name: getattr(self, name) for name in ParallelSizes.model_fields}
        return ParallelSizes(**sizes | dict.fromkeys(LAYERS_OF_STAGES))


LAYERS_OF_STAGES = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")


class TeacherConfig(Section):
    hf_path: Path
    """Directory of the teacher, like the student's. Must share its token vocabulary. With
    `source=student` the default is the student's."""
    source: Literal["checkpoint", "student"] = "checkpoint"
    """`checkpoint`: the frozen model of `hf_path`. `student`: the student itself, as it was when
    the run began, or following it by `ema_decay` or `lag_steps`."""
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """d: after each optimizer step the teacher is d · teacher + (1 − d) · student, in float32, from
    `hf_path` on. Needs `source=student`."""
    ema_interval: int = Field(1, gt=0)
    """Optimizer steps from one such mean to the next; with `ema_decay=0` the teacher is the student
    of the last of them."""
    lag_steps: int | None = Field(None, gt=0)
    """The teacher is the student of so many optimizer steps ago, each of which is one more copy of
    the weights. Needs `source=student`."""
    tokenizer: Path | None = None
    """As `student.tokenizer`, to check that both give every token the same id. Default:
    `hf_path`."""
    eos_token_map: dict[str, str] = Field({})
    """Student's token → teacher's token, as text: the two swap their places in the teacher's
    distribution. Needed where the models end an answer differently, as with a base student and an
    instruct teacher, `{ "<|endoftext|>" = "<|im_end|>" }`."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Of several teachers: of what this one says of a token, in the loss."""
    placement: Literal["colocated", "separate"] = "colocated"
    """`colocated`: on the student's ranks. `separate`: on `world_size` ranks of its own, behind the
    student's in the same torchrun world."""
    world_size: int | None = Field(None, gt=0)
    """Ranks of a `separate` teacher."""
    payload: Literal["hidden", "logits", "topk"] = "hidden"
    """What the teacher hands over. `hidden`: last hidden states, projected by the teacher's LM head
    on the student's last pipeline stage; exact, and 2 bytes × hidden size per token in bf16.
    `logits`: its vocab-parallel logits, a few microbatches at a time; exact, and 2·V/TP bytes.
    `topk`: the `objective.top_k` most probable tokens, with exact entropy and tail; 12·k + 12
    bytes."""
    microbatches_per_exchange: int | None = Field(None, gt=0)
    """Student microbatches that are scored, handed over and trained on at a time. Default: those of
    a whole optimizer step; with `logits`, as many as the student has pipeline stages."""
    offload: bool = False
    """Keep a `colocated` teacher's weights in host memory while it has nothing to score (GPU)."""
    dtype: Literal["float32", "bfloat16", "as_model"] = "as_model"
    """Type of the teacher's parameters and activations. `as_model`: that of `model.dtype`."""
    check: Literal["auto", "always", "never"] = "auto"
    """Compare it with transformers before it teaches: what both say of one response, on the CPU of
    rank 0's host. A teacher that says something else there stops the run. `auto`: at the first
    start of a run, where that fits into the host's memory and takes no minutes; `always`: at every
    start, whatever its size."""
    prompt: TeacherPromptConfig | None = None
    """`[teacher.prompt]`: how this teacher reads a prompt, where it is not as the student does.
    Default: the student's tokens, unless `data.teacher_prompt_key` or `_template` is set."""
    parallel: ParallelSizes | None = None
    """The teacher's own layout, in which every size that is not given is 1. Default: the student's
    tensor, pipeline and expert sizes, with all pipeline stages alike."""

    @property
    def follows(self) -> bool:
        """Whether its weights change with the student's."""
        return self.way_of_following != ""

    @property
    def way_of_following(self) -> str:
        """What a state that was kept may not differ in; empty of a frozen teacher."""
        if self.ema_decay is not None:
            return "ema_decay"
        return "" if self.lag_steps is None else f"lag_steps={self.lag_steps}"

    @model_validator(mode="after")
    def _fits_its_placement(self) -> "TeacherConfig":
        if (self.placement == "separate") != (self.world_size is not None):
            raise ValueError(
                f"placement={self.placement} with world_size={self.world_size}. Set world_size to "
                f"the number of ranks of a separate teacher, and leave it out of a colocated one."
            )
        if self.follows and self.source != "student":
            raise ValueError(
                f"ema_decay={self.ema_decay} and lag_steps={self.lag_steps} are of a teacher that "
                f"follows the student, and source={self.source}. Set source=student."
            )
        if self.ema_decay is not None and self.lag_steps is not None:
            raise ValueError(
                f"ema_decay={self.ema_decay} and lag_steps={self.lag_steps}: a teacher follows the "
                f"student in one way. Set one of them."
            )
        if self.ema_interval > 1 and self.ema_decay is None:
            raise ValueError(f"ema_interval={self.ema_interval} without ema_decay. Set that, too.")
        if self.source == "student" and self.eos_token_map:
            raise ValueError(
                f"eos_token_map={self.eos_token_map} with source=student: the student ends its "
                f"answers as itself. Leave the map out."
            )
        if self.follows and self.placement == "separate":
            raise ValueError(
                "placement=separate: a teacher that follows the student takes its weights after "
                "each step on the student's own ranks. Set placement=colocated; it may have a "
                "layout of its own (teacher.parallel)."
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
    deterministic_mode: bool = False
    """On GPUs: the same run gives the same bits, by slower kernels (docs/running.md says how far
    that goes). On CPU it always does."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Activation recomputation of the student: of the core attention, or of whole layers."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Of `full`: all layers in groups of `recompute_num_layers`, or only that many of a stage."""
    recompute_num_layers: int = Field(1, gt=0)
    """See `recompute_method`."""
