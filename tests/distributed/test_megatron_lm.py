"""Megatron-LM's layout, in and out: what its loader reads of ours, and what we read of the keys and
formats that it writes.

Its training scripts are in no package. `load_as_megatron_lm` follows them by hand: the tracker, the
arguments in common.pt, a GPTModel of those, and its state through dist_checkpointing.
"""

import argparse
import math
import pickle
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoModelForCausalLM

from megatron_eopd.config import ModelConfig
from megatron_eopd.conversion import to_mcore
from megatron_eopd.conversion.megatron_lm import Root, load_options
from megatron_eopd.conversion.to_hf import to_hf
from megatron_eopd.errors import CheckpointError
from megatron_eopd.model_paths import TRACKER
from megatron_eopd.models.build import build_model
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_weights import load_hf_weights
from megatron_eopd.models.load import check_files, load_mcore_weights, load_weights
from megatron_eopd.models.patches import let_routers_run_without_transformer_engine
from tests.distributed.test_conversion import (
    PART_BYTES,
    assert_same_weights,
    cli,
    convert,
    copied,
    die_at,
    refused,
    same_bits,
)
from tests.ranks import context_for, leave_groups, run_ranks
from tests.tiny_models import LLAMA3_ROPE, SHAPE, make_model

MOE = "qwen3_moe"


@pytest.fixture(scope="module")
def roots(family_dirs, tmp_path_factory) -> Path:
    """FAMILY: what Megatron-LM's --load takes."""
    out = tmp_path_factory.mktemp("roots")
    run_ranks(1, out, write_roots, family_dirs, out)
    return out


def write_roots(dirs, out):
    context = context_for(1, 1)
    for family, hf_dir in dirs.items():
        to_mcore.to_mcore(hf_dir, out / family, None, False, context, Root(None))


def test_a_root_is_a_tracker_and_a_release(qwen3_dir, tmp_path):
    text = convert(tmp_path, "to-mcore", qwen3_dir, tmp_path / "out", "--layout", "megatron-lm")
    out = tmp_path / "out"
    assert (out / TRACKER).read_text() == "release"
    assert sorted(path.name for path in out.iterdir()) == [TRACKER, "release"]
    names = {path.name for path in (out / "release").iterdir()}
    assert names == {".metadata", "metadata.json", "common.pt", "__0_0.distcp"} | {
        path.name for path in qwen3_dir.glob("*.json")
    }
    assert f"--load {out} --use-checkpoint-args --ckpt-format torch_dist" in text
    assert "--qk-layernorm" in text and "--no-load-optim" not in text


def test_an_iteration_has_its_name(qwen3_dir, tmp_path):
    """And asks Megatron-LM for no optimizer, which there is none of."""
    job = ("to-mcore", qwen3_dir, tmp_path / "out", "--iteration", 120)
    assert "Add --layout megatron-lm" in refused(tmp_path, *job)
    text = convert(tmp_path, *job, "--layout", "megatron-lm")
    assert "--no-load-optim --no-load-rng" in text
    assert (tmp_path / "out" / TRACKER).read_text() == "120"
    common = dist_checkpointing.load_common_state_dict(str(tmp_path / "out/iter_0000120"))
    assert common["iteration"] == 120 and common["checkpoint_version"] == 3.0


def options_parser() -> argparse.ArgumentParser:
    """Of Megatron-LM's, with its defaults, those that tell the model and that we may print."""
    parser = argparse.ArgumentParser()
    for name in ("load", "ckpt-format", "tokenizer-type", "tokenizer-model", "moe-router-dtype"):
        parser.add_argument(f"--{name}")
    for name in ("use-checkpoint-args", "qk-layernorm", "use-rope-scaling"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--norm-epsilon", type=float, default=1e-5)
    parser.add_argument("--rope-scaling-factor", type=float, default=8.0)
    parser.add_argument("--rotary-seq-len-interpolation-factor", type=float)
    return parser


def load_as_megatron_lm(options: str, context) -> GPTModel:
    """load_args_from_checkpoint and load_checkpoint, for a run of this layout."""
    args = options_parser().parse_args(options.split())
    name = Path(args.load) / Path(args.load, TRACKER).read_text()
    assert dist_checkpointing.check_is_distributed_checkpoint(str(name))
    common = dist_checkpointing.load_common_state_dict(str(name))
    stored = vars(common["args"])
    taken = {k: v for k, v in stored.items() if k not in ("qk_layernorm", "norm_epsilon")}
    args = Namespace(**(vars(args) | taken))
    model = build_as_megatron_lm(args, context)
    metadata = dist_checkpointing.serialization.load_content_metadata(preloaded_state_dict=common)
    state = {
        "args": args,
        "model": model.sharded_state_dict(
            metadata=metadata | {"dp_cp_group": context.groups.dp_cp}
        ),
    }
    loaded = dist_checkpointing.load(state, str(name))
    assert loaded["checkpoint_version"] == 3.0 and loaded["iteration"] == 0
    model.load_state_dict(loaded["model"], strict=True)
    return model.eval()


def build_as_megatron_lm(args: Namespace, context) -> GPTModel:
    """core_transformer_config_from_args and gpt_builder."""
    let_routers_run_without_transformer_engine()
    experts = {}
    if getattr(args, "num_experts", None):
        names = [name for name in vars(args) if name.startswith("moe_")]
        experts = {name: getattr(args, name) for name in names}
        experts |= {"num_moe_experts": args.num_experts, "moe_token_dispatcher_type": "alltoall"}
        experts |= {"moe_router_load_balancing_type": "none"}
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        qk_layernorm=args.qk_layernorm,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout,
        tensor_model_parallel_size=context.layout.tp,
        sequence_parallel=context.layout.sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        **experts,
    )
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in block.layer_specs:
        if "moe" in layer.submodules.mlp.module.__name__.lower():
            # The plain layers ask for the norm before experts as if it were fused into fc1. Those
            # of TransformerEngine, Megatron-LM's default, which are not installed, do not.
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        pg_collection=context.groups,
        parallel_output=False,
    )


def check_logits(tp, dirs, roots):
    context = context_for(tp, 1)
    tokens_BS = torch.arange(32)[None]
    mask_1BSS = torch.ones(1, 1, 32, 32).tril() < 0.5
    for family, hf_dir in dirs.items():
        options = load_options(Root(None), roots / family, read_hf_config(hf_dir), context.layout)
        model = load_as_megatron_lm(options, context)
        with torch.no_grad():
            found = model(tokens_BS, tokens_BS, mask_1BSS)
            expected = AutoModelForCausalLM.from_pretrained(hf_dir)(tokens_BS).logits
        assert found.shape[-1] == math.ceil(211 / 128) * 128
        torch.testing.assert_close(found[..., :211], expected, rtol=0, atol=1e-4, msg=family)


def test_megatron_lms_own_steps_give_transformers_logits(family_dirs, roots, tmp_path):
    """From stored arguments, the options that are printed, and a padded vocabulary, on 2 ranks."""
    dirs = {f: d for f, d in family_dirs.items() if f not in ("qwen3_yarn", "llama")}
    # Experts on tensor-parallel ranks need sequence parallelism, which the plain norm here has not.
    for tp, moe in ((2, False), (1, True)):
        some = {family: hf_dir for family, hf_dir in dirs.items() if ("moe" in family) is moe}
        run_ranks(2, tmp_path, check_logits, tp, some, roots)


@pytest.fixture(scope="module")
def rope_dirs(tmp_path_factory) -> dict[str, Path]:
    """Frequencies that Megatron-LM has options for."""
    out = tmp_path_factory.mktemp("rope")
    llama3 = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    return {
        name: make_model("llama", out / name, rope_parameters=parameters)
        for name, parameters in (("llama3", llama3), ("linear", linear))
    }


def test_scaled_frequencies_are_told_in_options(rope_dirs, tmp_path):
    run_ranks(1, tmp_path, write_roots, rope_dirs, tmp_path)
    run_ranks(1, tmp_path, check_logits, 1, rope_dirs, tmp_path)


def test_what_no_option_can_tell_is_said(family_dirs, tmp_path):
    """YaRN; and bands of Llama 3 that are not those that Megatron-LM has."""
    for family in ("qwen3_yarn", "llama"):
        job = ("to-mcore", family_dirs[family], tmp_path / family, "--layout", "megatron-lm")
        assert "(and an equivalent of config.json's rope_parameters" in convert(tmp_path, *job)


def renamed(item, rename):
    if isinstance(item, ShardedTensorFactory):
        return replace(item, key=rename(item.key))
    return replace(item, key=rename(item.key)) if isinstance(item, ShardedTensor) else item


def under(prefix: str):
    return lambda key: prefix + key


def with_plain_norms(key: str) -> str:
    key = key.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


def with_fused_norms(key: str) -> str:
    key = key.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    return key.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


# Options of Megatron-Core's sharded_state_dict, and what becomes of its keys.
STYLES = {
    "by layer": ({"non_homogeneous_layers": True}, under("")),
    "by layer and expert, fc1 in halves": ({"singleton_local_shards": True}, under("")),
    "under model": ({}, under("model.")),
    "by layer under module": ({"non_homogeneous_layers": True}, under("module.")),
    "plain norms": ({}, with_plain_norms),
    "plain norms by layer": ({"non_homogeneous_layers": True}, with_plain_norms),
    "fused norms": ({}, with_fused_norms),
}
OF_A_STATE = "torch's own, of a state dict"
LAYOUT_OF = {"qwen3": (2, 2, 1, 1), "qwen2_tied": (2, 1, 1, 1), MOE: (1, 2, 2, 1)}


@pytest.fixture(scope="module")
def foreign(family_dirs, tmp_path_factory) -> Path:
    """FAMILY/STYLE: saved under LAYOUT_OF; those of a state dict by one rank."""
    out = tmp_path_factory.mktemp("foreign")
    dirs = {family: family_dirs[family] for family in LAYOUT_OF}
    run_ranks(4, out, save_styles, dirs, out)
    run_ranks(1, out, save_states, dirs, out)
    return out


def save_styles(dirs, out):
    for family, hf_dir in dirs.items():
        context = context_for(*LAYOUT_OF[family])
        model = loaded(hf_dir, context)
        for style, (options, rename) in STYLES.items():
            metadata = options | {"dp_cp_group": context.groups.dp_cp}
            state = model.sharded_state_dict(metadata=metadata)
            state = {name: renamed(item, rename) for name, item in state.items()}
            (out / family / style).mkdir(parents=True, exist_ok=True)
            dist_checkpointing.save(state, str(out / family / style))
        leave_groups()


def loaded(hf_dir, context):
    (model,) = build_model(hf_dir, ModelConfig(), context)
    hf_config = read_hf_config(hf_dir)
    load_hf_weights([model], hf_dir, hf_config, context.layout, context.cpu_group)
    return model


def save_states(dirs, out):
    context = context_for(1, 1)
    for family, hf_dir in dirs.items():
        weights = {
            f"module.{name}": p.data for name, p in loaded(hf_dir, context).named_parameters()
        }
        optimizer = {"exp_avg": torch.ones(3), "step": 1}
        state = {"model": weights, "optimizer": optimizer, "iteration": 5}
        torch_checkpoint.save(state, checkpoint_id=out / family / OF_A_STATE)


def check_foreign(dirs, foreign, out):
    context = context_for(1, 1)
    for family, hf_dir in dirs.items():
        for style in (*STYLES, OF_A_STATE):
            back = out / family / style
            to_hf(foreign / family / style, back, hf_dir, None, 10**9, False, context)
            assert_same_weights(back, hf_dir)


def test_other_keys_come_back_as_the_same_model(family_dirs, foreign, tmp_path):
    """Bitwise, whatever layers, experts, halves of fc1 and norms are called."""
    dirs = {family: family_dirs[family] for family in LAYOUT_OF}
    run_ranks(2, tmp_path, check_foreign, dirs, foreign, tmp_path / "out")


def check_loading(dirs, foreign):
    for family, hf_dir in dirs.items():
        context = context_for(*LAYOUT_OF[family][:2], LAYOUT_OF[family][2])
        reference = loaded(hf_dir, context)
        for style in STYLES:
            (model,) = build_model(hf_dir, ModelConfig(), context)
            load_mcore_weights([model], foreign / family / style, SHAPE["vocab_size"], context)
            for (name, found), expected in zip(
                model.named_parameters(), reference.parameters(), strict=True
            ):
                assert same_bits(found.detach(), expected.detach()), (family, style, name)
        leave_groups()


def test_a_run_loads_other_keys(family_dirs, foreign, tmp_path):
    """Bitwise, by all ranks of a layout, padded vocabulary included."""
    dirs = {family: family_dirs[family] for family in LAYOUT_OF}
    run_ranks(4, tmp_path, check_loading, dirs, foreign)


def test_a_run_refuses_torchs_own_format_by_name(foreign):
    with pytest.raises(CheckpointError, match=r"torch_dcp or fsdp_dtensor.* to-hf .* OUT_DIR"):
        check_files(foreign / "qwen3" / OF_A_STATE)


def check_root_is_loaded(hf_dir, root):
    context = context_for(1, 1)
    (model,) = build_model(root, ModelConfig(), context)
    load_weights([model], root, context)
    for found, expected in zip(
        model.parameters(), loaded(hf_dir, context).parameters(), strict=True
    ):
        assert same_bits(found.detach(), expected.detach())


def test_a_run_takes_a_root_that_has_the_configuration(qwen3_dir, roots, tmp_path):
    root = copied(roots / "qwen3", tmp_path / "root")
    (root / "release/config.json").rename(root / "config.json")
    run_ranks(1, tmp_path, check_root_is_loaded, qwen3_dir, root)


def test_check_compares_other_keys_and_formats(qwen3_dir, foreign, tmp_path):
    """By the keys of the checkpoint; torch's own format has no logits, which is said first."""
    by_layer = foreign / "qwen3" / "by layer under module"
    assert "tensors: 0 of 47 differ" in convert(tmp_path, "check", qwen3_dir, by_layer)
    state = foreign / "qwen3" / OF_A_STATE
    text = convert(tmp_path, "check", qwen3_dir, state, "--no-logits")
    assert "tensors: 0 of 47 differ" in text
    text = refused(tmp_path, "check", qwen3_dir, state)
    assert "--no-logits" in text and "worst tensors" not in text


def test_what_is_missing_is_named_as_the_checkpoint_would(qwen3_dir, foreign, tmp_path):
    """By its layer where the checkpoint goes by layer."""
    bad = copied(foreign / "qwen3" / "by layer under module", tmp_path / "bad")
    metadata = pickle.loads((bad / ".metadata").read_bytes())
    del metadata.state_dict_metadata["module.decoder.layers.2.mlp.linear_fc2.weight"]
    (bad / ".metadata").write_bytes(pickle.dumps(metadata))
    text = refused(tmp_path, "to-hf", bad, tmp_path / "out", "--hf-config", qwen3_dir)
    assert text.splitlines()[1:] == ["  module.decoder.layers.2.mlp.linear_fc2.weight: missing"]


def test_the_way_back_follows_the_tracker(qwen3_dir, roots, tmp_path):
    root = copied(roots / "qwen3", tmp_path / "root")
    convert(tmp_path, "to-hf", root, tmp_path / "back")
    assert_same_weights(tmp_path / "back", qwen3_dir)
    assert "tensors: 0 of 47" in convert(tmp_path, "check", qwen3_dir, root)
    (root / "release").rename(root / "iter_0000100")
    assert "names release, but there is no" in refused(tmp_path, "to-hf", root, tmp_path / "out")
    (root / TRACKER).write_text("100")
    (root / "iter_0000100/config.json").rename(root / "config.json")
    convert(tmp_path, "to-hf", root / "iter_0000100", tmp_path / "again")
    assert_same_weights(tmp_path / "again", qwen3_dir)


def test_the_other_kind_of_directory_is_named(qwen3_dir, roots, tmp_path):
    """With the command that takes it."""
    root = roots / "qwen3"
    for path in (root, root / "release"):
        for job in (("to-mcore", path, tmp_path / "out"), ("check", path, root)):
            assert f"convert_hf.py to-hf {path} OUT_DIR" in refused(tmp_path, *job)
    for job in (("to-hf", qwen3_dir, tmp_path / "out"), ("check", qwen3_dir, qwen3_dir)):
        assert f"convert_hf.py to-mcore {qwen3_dir} OUT_DIR" in refused(tmp_path, *job)
    assert not list(tmp_path.glob("out*"))


def test_formats_that_are_not_read_are_named_by_every_command(qwen3_dir, tmp_path):
    legacy = tmp_path / "save/iter_0000100/mp_rank_00"
    legacy.mkdir(parents=True)
    (legacy / "model_optim_rng.pt").touch()
    (tmp_path / "save" / TRACKER).write_text("100")
    root, out = tmp_path / "save", tmp_path / "out"
    for job in (
        ("to-hf", root, out),
        ("to-hf", root, out, "--hf-config", qwen3_dir),
        ("to-mcore", root, out),
        ("check", qwen3_dir, root),
    ):
        text = refused(tmp_path, *job)
        assert "legacy format 'torch'" in text and "--ckpt-convert-format torch_dist" in text, job
    assert not list(tmp_path.glob("out*"))


def test_a_killed_conversion_into_a_root_goes_on(qwen3_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(to_mcore, "PART_BYTES", PART_BYTES)
    job = ("to-mcore", qwen3_dir, tmp_path / "out", "--layout", "megatron-lm")
    with pytest.MonkeyPatch.context() as patch:
        die_at(to_mcore, "_read", 12, patch)
        assert cli(tmp_path, *job)[0] < 0
    below = tmp_path / "out.unfinished/release"
    written = {path.name: path.stat() for path in below.glob("*.distcp")}
    finished = [f"__{int(path.name[5:10])}_0.distcp" for path in below.glob("part-*.written")]
    assert len(finished) >= 2 and not (tmp_path / "out").exists()
    convert(tmp_path, *job)
    for name in finished:
        assert (tmp_path / "out/release" / name).stat().st_mtime_ns == written[name].st_mtime_ns
    convert(tmp_path, "to-hf", tmp_path / "out", tmp_path / "back")
    assert_same_weights(tmp_path / "back", qwen3_dir)


def test_another_layout_starts_anew(qwen3_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(to_mcore, "PART_BYTES", PART_BYTES)
    job = ("to-mcore", qwen3_dir, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        die_at(to_mcore, "_read", 12, patch)
        assert cli(tmp_path, *job)[0] < 0
    convert(tmp_path, *job, "--layout", "megatron-lm")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [TRACKER, "release"]


def test_other_checkpoints_are_never_overwritten(qwen3_dir, roots, tmp_path):
    """A root is replaced where it holds nothing but the checkpoint of that name."""
    root = copied(roots / "qwen3", tmp_path / "root")
    job = ("to-mcore", qwen3_dir, root)
    assert "--overwrite to replace it" in refused(tmp_path, *job, "--layout", "megatron-lm")
    convert(tmp_path, *job, "--layout", "megatron-lm", "--overwrite")
    (root / "iter_0000100").mkdir()
    for options in ((), ("--layout", "megatron-lm"), ("--layout", "megatron-lm", "--iteration", 7)):
        text = refused(tmp_path, *job, *options, "--overwrite")
        assert f"{root} also holds" in text and "iter_0000100" in text
    assert (root / "release/.metadata").is_file()
