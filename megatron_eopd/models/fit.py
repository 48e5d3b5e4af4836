"""Whether a model can be cut, and trained, in a layout. In: config.json, sizes. Out: nothing, or an
error that names the options.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from megatron_eopd.config import Config, StudentConfig, TeacherConfig
from megatron_eopd.errors import ConfigError
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_weights import head_shape, num_experts
from megatron_eopd.models.tensor_shapes import tensor_shapes
from megatron_eopd.parallel.layout import Layout

SHOWN = 8
"""Numbers of layers that a message proposes, those nearest to equal stages."""


def check_divides(
    hf_config: PretrainedConfig, layout: Layout, who: str, section: str = "parallel"
) -> None:
    """Raise ConfigError when the model cannot be cut into this many parts."""
    tensor = f"{section}.tensor_model_parallel_size={layout.tp}"
    sizes = [
        ("num_attention_heads", layout.tp, tensor),
        ("num_key_value_heads", layout.tp, tensor),
        ("intermediate_size", layout.tp, tensor),
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
    _check_layers(hf_config.num_hidden_layers, layout, who, section)


def _check_layers(num_layers: int, layout: Layout, who: str, section: str) -> None:
    """What Megatron-Core asks of a pipeline, equal or not."""
    if _deals_out(layout, num_layers):
        return
    stages = f"{section}.pipeline_model_parallel_size={layout.pp}"
    if layout.vpp > 1:
        stages += f" × {section}.virtual_pipeline_model_parallel_size={layout.vpp}"
    last = f"{section}.decoder_last_pipeline_num_layers"
    cuts = {n: replace(layout, last_stage_layers=n) for n in range(1, num_layers)}
    near = sorted(
        (n for n, cut in cuts.items() if layout.pp > 1 and _deals_out(cut, num_layers)),
        key=lambda n: abs(n * layout.pp - num_layers),
    )[:SHOWN]
    if layout.is_uneven:
        first = f"{section}.decoder_first_pipeline_num_layers"
        asked = {first: layout.first_stage_layers, last: layout.last_stage_layers}
        text = ", ".join(f"{option}={n}" for option, n in asked.items() if n is not None)
        remedy = f"Set {last} to one of {sorted(near)}" if near else f"Set another {first}"
        raise ConfigError(
            f"{text} and {stages} do not deal out the {who}'s num_hidden_layers={num_layers}: each "
            f"stage must get a positive multiple of {layout.vpp}, and those without a number "
            f"equally many. {remedy}."
        )
    parts = layout.pp * layout.vpp
    fits = [n for n in range(1, parts) if num_layers % n == 0]
    # A teacher in the student's sizes has no number of layers of its own.
    is_own = who == "student" or section != "parallel"
    raise ConfigError(
        f"{stages} does not divide the {who}'s num_hidden_layers={num_layers}. It must come to one "
        f"of {fits}" + (f", or {last} must be one of {sorted(near)}." if near and is_own else ".")
    )


def _deals_out(layout: Layout, num_layers: int) -> bool:
    """Whether every layer has a stage, and every chunk of a stage the same number of them."""
    stages = layout.layers_per_stage(num_layers)
    return sum(stages) == num_layers and all(n > 0 and n % layout.vpp == 0 for n in stages)


def check_student(config: Config, hf_config: PretrainedConfig, layout: Layout) -> None:
    """Raise ConfigError when the student cannot be cut, or cannot be trained, in this layout."""
    check_divides(hf_config, layout, "student")
    if config.training.global_batch_size < layout.dp:
        raise ConfigError(
            f"training.global_batch_size={config.training.global_batch_size} is less than the "
            f"data-parallel size {layout.dp}: some ranks would never have a sample. Set it to "
            f"{layout.dp} or more."
        )
    model, stages = config.model, layout.layers_per_stage(hf_config.num_hidden_layers)
    is_uniform = model.recompute_granularity == "full" and model.recompute_method == "uniform"
    for chunk in (count // layout.vpp for count in stages) if is_uniform else ():
        if chunk % model.recompute_num_layers:
            # Megatron-Core would run past the last layer.
            raise ConfigError(
                f"model.recompute_num_layers={model.recompute_num_layers} does not divide the "
                f"{chunk} layers of a model chunk. Set it to a divisor, or "
                f"model.recompute_method=block."
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


SAME_IN_BOTH = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "rope_parameters", "rms_norm_eps"),
    *("tie_word_embeddings", "intermediate_size", "hidden_act", "attention_bias"),
    *("num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"),
    *("decoder_sparse_step", "mlp_only_layers"),
)
"""Of a student and a teacher that follows it; then their tensors' shapes are compared."""


def check_same_architecture(
    teacher: TeacherConfig, section: str, hf_config: PretrainedConfig, student: StudentConfig
) -> None:
    """Raise ConfigError where weights of the student mean something else in the teacher."""
    of_student = read_hf_config(student.hf_path)
    for name in SAME_IN_BOTH:
        ours, theirs = (getattr(each, name, None) for each in (of_student, hf_config))
        if ours != theirs:
            break
    else:
        shapes = [tensor_shapes(each) for each in (of_student, hf_config)]
        differ = [key for key in shapes[0] if shapes[0][key] != shapes[1].get(key)]
        if not differ and shapes[0].keys() == shapes[1].keys():
            return
        name = (differ or sorted(shapes[1].keys() - shapes[0].keys()))[0]
        ours, theirs = (each.get(name) for each in shapes)
    option = "ema_decay" if teacher.ema_decay is not None else "lag_steps"
    raise ConfigError(
        f"{section}.{option}={getattr(teacher, option)}: the teacher {teacher.hf_path} cannot "
        f"follow the student {student.hf_path}, which has another architecture: {name} is {theirs} "
        f"to the teacher and {ours} to the student. Leave {section}.hf_path out, or set it to a "
        f"model of the student's shape."
    )


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
