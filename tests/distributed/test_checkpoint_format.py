"""What lies in a checkpoint is the same tensors whatever layout wrote it, as others read it too.

The reference is torch's own reader (torch.distributed.checkpoint), which knows nothing of ours.
"""

import io
import pickle
import shutil
import tarfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as torch_load

from megatron_eopd.checkpoints import files
from megatron_eopd.checkpoints.contents import adam_step
from megatron_eopd.checkpoints.loader import load
from megatron_eopd.checkpoints.position import make_position
from megatron_eopd.errors import CheckpointError, RemoteError
from megatron_eopd.models.load import load_mcore_weights
from megatron_eopd.models.mcore_files import MCoreCheckpoint
from tests.distributed.test_models import random_rollouts
from tests.distributed.test_step import VOCAB, build, make_config, take_step
from tests.ranks import context_for, leave_groups, run_ranks
from tests.saving import save
from tests.tiny_models import make_model

FORMAT_1 = Path(__file__).parent / "recorded/checkpoint_of_format_1.tar.gz"
LAYOUTS = {
    "dp 2": {},
    "tp 2": {"tp": 2},
    "pp 2": {"pp": 2},
    "vpp 2": {"pp": 2, "vpp": 2},
    "cp 2": {"cp": 2},
}
EXPERT_LAYOUTS = {
    "ep 2": {"ep": 2},
    "tp 2": {"tp": 2, "expert_tp": 2, "sequence_parallel": True},
    "tp 2 ep 2": {"tp": 2, "ep": 2, "sequence_parallel": True},
    "dp 2": {},
    "vpp 2": {"pp": 2, "vpp": 2},
}


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """All whole tensors, by torch, without the padding of vocabularies."""
    metadata = FileSystemReader(directory).read_metadata()
    state = {
        key: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch_load(state, storage_reader=FileSystemReader(directory), no_dist=True)
    assert all(tensor.isfinite().all() for tensor in state.values())
    is_vocab = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {k: t[:VOCAB] if k.endswith(is_vocab) else t for k, t in state.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])]
    assert not different, f"{len(different)} of {len(found)}: {different[:3]}"


def check_layouts(layouts, student_dir, teacher_dir, dtype, out):
    """Two steps under the first layout; then each layout loads what the one before has saved."""
    config = make_config(student_dir, teacher_dir, model={"dtype": dtype})
    directory = None
    for name, sizes in layouts.items():
        context = context_for(**{"tp": 1, "pp": 1} | sizes)
        student, pool, token_loss = build(config, context)
        if directory is None:
            rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
            for _ in range(2):
                take_step(student, token_loss, pool, rollouts, config, context, step=0)
        else:
            load(directory, student, VOCAB, context)
        assert adam_step(student) == 2
        position = make_position(2, config.seed, "digest", context)
        directory = save(out / name, student, position, student_dir, context)
        leave_groups()


@pytest.mark.parametrize(
    "family,layouts,dtype",
    [
        ("qwen3", LAYOUTS, "float32"),
        ("qwen3_tied", LAYOUTS, "bfloat16"),
        ("qwen3_moe", EXPERT_LAYOUTS, "bfloat16"),
        ("qwen3_moe_mixed", EXPERT_LAYOUTS, "float32"),
    ],
)
def test_every_layout_writes_and_reads_the_same_tensors(family, layouts, dtype, tmp_path):
    """Bitwise: weights, masters and moments."""
    student, teacher = (make_model(family, tmp_path / f"m{n}", seed=n) for n in (1, 2))
    run_ranks(2, tmp_path, check_layouts, layouts, student, teacher, dtype, tmp_path / "out")
    first, *others = (tensors_in(files.newest(tmp_path / "out" / n)) for n in layouts)
    is_master = [key.startswith("optimizer.state.param.") for key in first]
    assert any(is_master) == (dtype == "bfloat16")
    assert sum(key.startswith("optimizer.state.exp_avg_sq.") for key in first) > 5
    for other in others:
        assert_same(other, first)


def check_other_types(student_dir, teacher_dir, out):
    """bfloat16 → float32 → bfloat16."""
    context = context_for(1, 1)
    directory = None
    for number, dtype in enumerate(("bfloat16", "float32", "bfloat16")):
        config = make_config(student_dir, teacher_dir, model={"dtype": dtype})
        student, pool, token_loss = build(config, context)
        if directory is None:
            rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
            take_step(student, token_loss, pool, rollouts, config, context, step=0)
        else:
            load(directory, student, VOCAB, context)
        position = make_position(1, config.seed, "digest", context)
        directory = save(out / str(number), student, position, student_dir, context)
    leave_groups()


def test_another_type_goes_on_from_the_masters(qwen3_dir, teacher_dir, tmp_path):
    run_ranks(1, tmp_path, check_other_types, qwen3_dir, teacher_dir, tmp_path)
    first, single, back = (tensors_in(files.newest(tmp_path / str(n))) for n in range(3))
    assert_same(back, first)
    for key, master in first.items():
        if key.startswith("optimizer.state.param."):
            assert torch.equal(single[key.removeprefix("optimizer.state.param.")], master)


def check_megatron(student_dir, teacher_dir, out):
    context = context_for(1, 1)
    config = make_config(student_dir, teacher_dir, model={"dtype": "bfloat16"})
    student, pool, token_loss = build(config, context)
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    take_step(student, token_loss, pool, rollouts, config, context, step=0)
    position = make_position(1, config.seed, "digest", context)
    directory = save(out, student, position, student_dir, context)
    leave_groups()
    context = context_for(2, 1)
    student, _, _ = build(config, context)
    load(directory, student, VOCAB, context)
    (chunk,) = student.chunks
    state = chunk.sharded_state_dict()
    whole = student.optimizer.sharded_state_dict(
        state,
        is_loading=True,
        metadata={
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        },
    )["param_state"]
    loaded = dist_checkpointing.load({"model": state, "optimizer": whole}, str(directory))
    for name, parameter in chunk.named_parameters():
        assert torch.equal(loaded["model"][name], parameter)
    (optimizer,) = student.optimizer.chained_optimizers
    before = [tensor.clone() for s in optimizer.optimizer.state.values() for tensor in s.values()]
    for tensors in optimizer.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            tensors[name].zero_()
    steps = [tensors.pop("step") for tensors in optimizer.optimizer.state.values()]
    optimizer.load_parameter_state_from_fully_reshardable(loaded["optimizer"])
    for tensors, step in zip(optimizer.optimizer.state.values(), steps, strict=True):
        tensors |= {"step": step}
    after = [s[n] for s in optimizer.optimizer.state.values() for n in ("exp_avg", "exp_avg_sq")]
    kept = [t for t in before if t.ndim]
    assert len(kept) == len(after) and all(map(torch.equal, kept, after))
    leave_groups()


def test_megatron_core_reads_what_is_written(qwen3_dir, teacher_dir, tmp_path):
    """Weights, masters and moments of DP 2 at TP 2, by its own loader."""
    run_ranks(2, tmp_path, check_megatron, qwen3_dir, teacher_dir, tmp_path / "out")


TWO_LAYERS = {"ep 2": {"ep": 2}, "pp 2": {"pp": 2}, "dp 2": {}}


def check_format_1(directory, student_dir, out):
    for name, sizes in TWO_LAYERS.items():
        context = context_for(**{"tp": 1, "pp": 1} | sizes)
        config = make_config(student_dir, student_dir, model={"dtype": "bfloat16"})
        student, _, _ = build(config, context)
        position = load(directory, student, 29, context)
        assert (position.iteration, position.format, adam_step(student)) == (2, 1, 2)
        again = make_position(2, config.seed, "digest", context)
        save(out / name, student, again, student_dir, context)
        leave_groups()


def test_checkpoints_of_format_1_go_on_under_every_layout(tmp_path):
    """Megatron-Core wrote it at EP 2 × DP 2, with the whole optimizer gathered."""
    with tarfile.open(FORMAT_1) as archive:
        archive.extractall(tmp_path, filter="data")
    sizes = {"vocab_size": 29, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    experts = {"num_experts": 2, "moe_intermediate_size": 4, "num_experts_per_tok": 1}
    layers = {"decoder_sparse_step": 2, "mlp_only_layers": []}
    model = make_model("qwen3_moe_mixed", tmp_path / "m", **sizes, **heads, **experts, **layers)
    run_ranks(2, tmp_path, check_format_1, tmp_path / "000002", model, tmp_path / "out")
    expected = {key: t[:29] for key, t in tensors_in(tmp_path / "000002").items()}
    for name in TWO_LAYERS:
        found = tensors_in(files.newest(tmp_path / "out" / name))
        assert_same({key: t[:29] for key, t in found.items()}, expected)


class Hostile:
    """A pickle that creates a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def check_hostile(directory, trap, student_dir, teacher_dir):
    context = context_for(1, 1)
    config = make_config(student_dir, teacher_dir)
    student, _, _ = build(config, context)
    position = make_position(1, config.seed, "digest", context)
    whole = save(directory, student, position, student_dir, context)
    names = [path.name for path in whole.iterdir()]
    for name in names:
        spoilt = directory / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(whole, spoilt)
        for content in (pickle.dumps(Hostile(trap)), saved_by_torch(Hostile(trap))):
            size = (whole / name).stat().st_size
            (spoilt / name).write_bytes(content + b"\0" * max(size - len(content), 0))
            for read in (
                partial(load, spoilt, student, VOCAB, context),
                partial(load_mcore_weights, student.chunks, spoilt, VOCAB, context),
                partial(MCoreCheckpoint, spoilt),
                partial(files.quick_problems, spoilt),
            ):
                with suppress(CheckpointError, RemoteError):
                    read()
            assert not trap.exists(), f"{name} was executed"
    leave_groups()


def saved_by_torch(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_no_file_of_a_checkpoint_is_executed(qwen3_dir, teacher_dir, tmp_path):
    """A hostile pickle in the place of each."""
    trap = tmp_path / "executed"
    pickle.loads(pickle.dumps(Hostile(trap)))
    assert trap.exists(), "it works"
    trap.unlink()
    run_ranks(1, tmp_path, check_hostile, tmp_path / "run", trap, qwen3_dir, teacher_dir)
