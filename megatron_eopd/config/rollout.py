"""Options of what writes the responses, and of how it gets the weights."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_eopd.config.section import Section


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
    """Ids that end a response; of the student alone where a teacher has an `eos_token_map`, else of
    both. Default: eos_token_id of each model's generation_config.json, config.json or tokenizer,
    which must agree, with the map where there is one."""
    replay: Path | None = None
    """Folder of recorded rollouts to train on instead of generating."""
    record: bool = False
    """Keep every iteration's rollouts under RUN_DIR/rollouts/, ready to be replayed."""
    placement: Literal["colocated", "separate"] = "colocated"
    """`colocated`: vLLM engines on the student's ranks, asleep while it trains. `separate`: on
    `world_size` ranks of their own, behind student and teachers in the same torchrun world."""
    world_size: int | None = Field(None, gt=0)
    """Ranks of `separate` engines."""
    num_engines: int | None = Field(None, gt=0)
    """Engines, on the first ranks. Default: as many as the ranks hold, which is one for each
    `tensor_model_parallel_size` ranks of a host."""
    tensor_model_parallel_size: int = Field(1, gt=0)
    """Tensor-parallel size of an engine, independent of the trainer's: so many neighbouring ranks
    of a host own it."""
    dtype: Literal["float32", "bfloat16", "as_model"] = "as_model"
    """Type of vLLM's weights and activations."""
    max_num_seqs: int = Field(256, gt=0)
    """Most sequences vLLM runs at once."""
    kv_cache_gib: float = Field(4.0, gt=0)
    """Memory of vLLM's key/value cache, in GiB."""
    num_threads: int = Field(1, gt=0)
    """CPU threads of a vLLM worker; ignored on GPU."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Longest wait, in seconds, for an engine process to become ready."""
    generate_timeout_s: float = Field(1800.0, gt=0)
    """Longest wait, in seconds, for the rollouts of one iteration."""
    engine_timeout_s: float = Field(180.0, gt=0)
    """Longest silence, in seconds, of an engine that has requests; it is then killed, and its
    requests go to others. From half of it on it gets no new ones. An engine tells of itself every
    second, between two tokens."""
    max_restarts: int = Field(3, ge=0)
    """An engine that dies so many times in a row, without an iteration's rollouts in between, is
    not started again."""
    min_engines: int = Field(1, gt=0)
    """The run ends with an error when fewer engines than this are left."""
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

    @model_validator(mode="after")
    def _records_what_is_new(self) -> "RolloutConfig":
        if self.record and self.replay is not None:
            raise ValueError(
                f"record=true would be ignored with replay={self.replay}: its rollouts are on disk "
                f"already. Set record=false."
            )
        return self

    @model_validator(mode="after")
    def _fits_its_placement(self) -> "RolloutConfig":
        if (self.placement == "separate") != (self.world_size is not None):
            raise ValueError(
                f"placement={self.placement} with world_size={self.world_size}. Set world_size to "
                f"the number of ranks of separate engines, and leave it out of colocated ones."
            )
        if self.num_engines is not None and self.min_engines > self.num_engines:
            raise ValueError(
                f"min_engines={self.min_engines} is above num_engines={self.num_engines}. Set it "
                f"to {self.num_engines} or less."
            )
        return self

    @property
    def uses_references(self) -> bool:
        return max(self.reference_fraction, self.final_reference_fraction or 0.0) > 0

    @property
    def ever_samples(self) -> bool:
        """Whether any iteration needs responses of the student's own."""
        last = self.final_reference_fraction
        return min(self.reference_fraction, 1.0 if last is None else last) < 1


class WeightSyncConfig(Section):
    bucket_mib: float = Field(64.0, gt=0)
    """Tensors are gathered and handed over in buckets of about this many MiB; one is packed while
    another is read, so each pipeline stage holds two of them. A larger tensor is a bucket of its
    own, and the two are then of its size."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest wait, in seconds, for an engine to read one bucket, and for it to be done with all
    of them once the last was handed over. An engine that is later than that is killed."""
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
