"""Whether a model can be cut, and trained, in a layout. In: config.json, sizes. Out: nothing, or an
error that names the options.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from megatron_eopd.config import Config, TeacherConfig
from megatron_eopd.errors import ConfigError
from megatron_eopd.models.hf_weights import head_shape, num_experts
from megatron_eopd.parallel.layout import Layout


def check_divides(
    hf_config: PretrainedConfig, layout: Layout, who: str, section: str = "parallel"
) -> None:
    """Raise ConfigError when the model cannot be cut into this many parts."""
    stages = f"{section}.pipeline_model_parallel_size={layout.pp}"
    if layout.vpp > 1:
        stages += f" × {section}.virtual_pipeline_model_parallel_size={layout.vpp}"
    tensor = f"{section}.tensor_model_parallel_size={layout.tp}"
    sizes = [
        ("num_attention_heads", layout.tp, tensor),
        ("num_key_value_heads", layout.tp, tensor),
        ("intermediate_size", layout.tp, tensor),
        ("num_hidden_layers", layout.pp * layout.vpp, stages),
    ]
    if num_experts(hf_config):
        expert_tensor = f"{section}.expert_tensor_parallel_size={layout.expert_tp}"
        sizes += [
            ("num_experts", layout.ep, f"{section}.expert_model_parallel_size={layout.ep}"),
            ("moe_intermediate_size", layout.expert_tp, expert_tensor),
        ]
        if layout.tp > 1 and not layout.sequence_parallel:
            raise ConfigError(
                f"the {who} has experts, and {section}.tensor_model_parallel_size={layout.tp}: "
                f"Megatron-Core then needs {section}.sequence_parallel=true."
            )
    elif layout.ep * layout.expert_tp > 1:
        raise ConfigError(
            f"{section}.expert_model_parallel_size={layout.ep} and "
            f"{section}.expert_tensor_parallel_size={layout.expert_tp}, but the {who} has no "
            f"experts. Set both to 1."
        )
    for name, parts, options in sizes:
        size = getattr(hf_config, name)
        if size % parts:
            fits = [n for n in range(1, parts) if size % n == 0]
            raise ConfigError(
                f"{options} does not divide the {who}'s {name}={size}. It must come to one of "
                f"{fits}."
            )


def check_student(config: Config, hf_config: PretrainedConfig, layout: Layout) -> None:
    """Raise ConfigError when the student cannot be cut, or cannot be trained, in this layout."""
    check_divides(hf_config, layout, "student")
    if config.training.global_batch_size < layout.dp:
        raise ConfigError(
            f"training.global_batch_size={config.training.global_batch_size} is less than the "
            f"data-parallel size {layout.dp}: some ranks would never have a sample. Set it to "
            f"{layout.dp} or more."
        )
    model, chunk = config.model, hf_config.num_hidden_layers // (layout.pp * layout.vpp)
    is_uniform = model.recompute_granularity == "full" and model.recompute_method == "uniform"
    if is_uniform and chunk % model.recompute_num_layers:
        # Megatron-Core would run past the last layer.
        raise ConfigError(
            f"model.recompute_num_layers={model.recompute_num_layers} does not divide the {chunk} "
            f"layers of a model chunk. Set it to a divisor, or model.recompute_method=block."
        )


def check_teacher(
    teacher: TeacherConfig, section: str, hf_config: PretrainedConfig, layout: Layout
) -> None:
    """Raise ConfigError when a teacher cannot be cut into this many parts."""
    if teacher.parallel is not None:
        check_divides(hf_config, layout, section, f"{section}.parallel")
        return
    if not num_experts(hf_config):  # the student's sizes for its experts do not mean this teacher
        layout = replace(layout, ep=1, expert_tp=1)
    check_divides(hf_config, layout, section)


def check_vllm(hf_config: PretrainedConfig) -> None:
    """Raise ConfigError where vLLM would make another model of the student's config.json."""
    heads = head_shape(hf_config)
    usual = hf_config.hidden_size // heads.num_heads
    if hf_config.model_type == "qwen2" and heads.head_dim != usual:
        raise ConfigError(
            f"student.hf_path: config.json has head_dim={heads.head_dim}, but for "
            f"model_type='qwen2' vLLM takes hidden_size / num_attention_heads={usual} whatever "
            f"stands there. Set rollout.engine=megatron, or take another student."
        )
