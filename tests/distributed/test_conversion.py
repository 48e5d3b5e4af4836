"""Checkpoints between Hugging Face and Megatron: HF → Megatron → HF gives back every bit, whatever
the layout; an interrupted conversion goes on; what is damaged or another model's is refused.

`cli` is the command itself, forked instead of started: nobody imports torch again.
"""

import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_eopd.checkpoints import files
from megatron_eopd.checkpoints.position import make_position
from megatron_eopd.config import ModelConfig
from megatron_eopd.conversion import to_hf, to_mcore
from megatron_eopd.conversion.check import difference_of
from megatron_eopd.models import hf_files, hf_weights, mcore_writer
from megatron_eopd.models.build import build_model
from megatron_eopd.models.export import Exporter
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_files import INDEX, HFCheckpoint, PlannedFile, SafetensorsWriter
from megatron_eopd.models.hf_weights import load_hf_weights
from megatron_eopd.models.load import load_mcore_weights
from megatron_eopd.models.mcore_writer import MCoreWriter
from megatron_eopd.parallel.init import free_port
from megatron_eopd.training.optimizer import make_trainable
from megatron_eopd.weight_sync.manifest import TensorSpec
from tests.distributed.test_step import make_config
from tests.ranks import context_for, leave_groups, run_ranks
from tests.saving import save
from tests.tiny_models import FAMILIES, SHAPE, make_model

CONVERT = Path(__file__).parents[2] / "tools/convert_hf.py"
# (TP, PP, EP, expert TP) of 4 ranks; data parallelism fills up what is left.
LAYOUTS = [(2, 2, 1, 1), (1, 4, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2)]
# So small that the tiny models (0.8 to 2 MB) become several files of both kinds.
PART_BYTES = 50_000
SHARD_SIZE = "60KB"


def families_on(layout: tuple[int, int, int, int]) -> list[str]:
    """Those with experts on every layout that spreads experts, and all on one of the others."""
    number = LAYOUTS.index(layout)
    return [f for f in FAMILIES if "moe" in f] if layout[2] > 1 else list(FAMILIES)[number::2]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_same_weights(found: Path, expected: Path) -> None:
    """Of two Hugging Face directories: names, types and bits."""
    with HFCheckpoint(expected) as a, HFCheckpoint(found) as b:
        assert a.names() == b.names()
        for name in sorted(a.names()):
            assert same_bits(a.slice(name)[:], b.slice(name)[:]), name


def cli(
    tmp_path: Path,
    *arguments: object,
    ranks: int = 1,
    cwd: Path | None = None,
    file_limit: int | None = None,
) -> tuple[int, str]:
    """Largest exit code of the ranks, as torchrun would start them, and all they printed.

    file_limit: the kernel refuses to let a file grow beyond this (EFBIG).
    """
    log, port = tmp_path / "log", free_port()
    log.write_text("")
    processes = [
        multiprocessing.get_context("fork").Process(
            target=_cli_main, args=(rank, ranks, port, log, cwd, file_limit, arguments)
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max((p.exitcode for p in processes), key=abs), log.read_text()


def _cli_main(rank, ranks, port, log, cwd, file_limit, arguments):
    torch.set_num_threads(1)
    os.chdir(cwd or Path.cwd())
    if ranks > 1:
        places = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {k: str(v) for k, v in (places | {"MASTER_PORT": port}).items()}
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    sys.argv = [str(CONVERT), *map(str, arguments)]
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    runpy.run_path(str(CONVERT), run_name="__main__")


def convert(tmp_path: Path, *arguments: object, **options) -> str:
    code, text = cli(tmp_path, *arguments, **options)
    assert code == 0, text
    return text


def refused(tmp_path: Path, *arguments: object, **options) -> str:
    """What it says: an error of one sentence or a list, and no traceback."""
    code, text = cli(tmp_path, *arguments, **options)
    assert code == 2 and "Traceback" not in text, text
    return text[text.index("error: ") :]


@pytest.fixture(scope="module")
def converted(family_dirs, tmp_path_factory) -> Path:
    """FAMILY: Megatron checkpoint, FAMILY-hf: that one back again; written by 4 ranks."""
    out = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_mcore, "PART_BYTES", PART_BYTES)
        run_ranks(4, out, write_round_trips, family_dirs, out)
    return out


def write_round_trips(dirs, out):
    context = context_for(1, 1)
    for family, hf_dir in dirs.items():
        to_mcore.to_mcore(hf_dir, out / family, None, False, context)
        to_hf.to_hf(out / family, out / f"{family}-hf", None, None, 60_000, False, context)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_identity(family, family_dirs, converted):
    """Bitwise, and config.json says the same."""
    back = converted / f"{family}-hf"
    assert len(list(converted.glob(f"{family}/*.distcp"))) > 4, "each rank wrote some"
    assert len(list(back.glob("*.safetensors"))) > 4
    assert_same_weights(back, family_dirs[family])
    configs = (json.loads((d / "config.json").read_text()) for d in (back, family_dirs[family]))
    assert next(configs) == next(configs)


def check_loading(dirs, converted):
    for layout in LAYOUTS:
        context = context_for(*layout, sequence_parallel=layout[0] > 1)
        for family in families_on(layout):
            # In the type of a run, whatever that of the checkpoint is.
            config = ModelConfig(dtype="float32" if layout[2] == 1 else "bfloat16")
            (model,), (reference,) = (build_model(dirs[family], config, context) for _ in range(2))
            load_mcore_weights([model], converted / family, SHAPE["vocab_size"], context)
            hf_config = read_hf_config(dirs[family])
            groups = context.layout, context.cpu_group
            load_hf_weights([reference], dirs[family], hf_config, *groups)
            parameters = zip(model.named_parameters(), reference.parameters(), strict=True)
            for (name, found), expected in parameters:
                assert same_bits(found.detach(), expected.detach()), (family, layout, name)
        leave_groups()


def test_every_layout_loads_from_megatron_what_it_loads_from_hugging_face(
    family_dirs, converted, tmp_path
):
    """Bitwise, padded rows of the vocabulary included."""
    run_ranks(4, tmp_path, check_loading, family_dirs, converted)


SAVED = [
    (f"{family}-{'-'.join(map(str, layout))}", family)
    for layout in LAYOUTS
    for family in families_on(layout)
]


@pytest.fixture(scope="module")
def by_megatron(family_dirs, tmp_path_factory) -> Path:
    """NAME of SAVED: a checkpoint that Megatron saved under that layout; and two of runs, with
    optimizer: run-FAMILY, and run-FAMILY-hf as the run itself exports it."""
    out = tmp_path_factory.mktemp("by_megatron")
    for name, _ in SAVED:
        (out / name).mkdir()
    run_ranks(4, out, save_by_megatron, family_dirs, out)
    return out


def save_by_megatron(dirs, out):
    for layout in LAYOUTS:
        context = context_for(*layout, sequence_parallel=layout[0] > 1)
        for family in families_on(layout):
            (model,) = build_model(dirs[family], ModelConfig(), context)
            hf_config = read_hf_config(dirs[family])
            load_hf_weights([model], dirs[family], hf_config, context.layout, context.cpu_group)
            name = f"{family}-{'-'.join(map(str, layout))}"
            dist_checkpointing.save(model.sharded_state_dict(), str(out / name))
            if (family, layout) in RUNS:
                save_a_run(model, family, dirs[family], out, context)
        leave_groups()


RUNS = [("qwen3", LAYOUTS[0]), ("qwen3_moe", LAYOUTS[2])]


def save_a_run(model, family, hf_dir, out, context):
    config = make_config(hf_dir, hf_dir)
    student = make_trainable([model], config, context)
    student.wrapped[0].zero_grad_buffer()
    student.optimizer.step()  # on no gradients: Adam has moments, and weights have decayed
    position = make_position(1, config.seed, "digest", context)
    save(out / f"run-{family}", student, position, hf_dir, context, keep_last=1)
    hf_config = read_hf_config(hf_dir)
    exporter = Exporter([model], hf_config, hf_config.vocab_size, context, bucket_bytes=100_000)
    exporter.save_hf(hf_dir, out / f"run-{family}-hf")


def check_way_back(dirs, by_megatron, out):
    context = context_for(1, 1)
    for name, family in SAVED:
        to_hf.to_hf(by_megatron / name, out / name, dirs[family], None, 10**9, False, context)
    for family, _ in RUNS:
        run = files.newest(by_megatron / f"run-{family}")
        to_hf.to_hf(run, out / f"run-{family}", None, None, 10**9, False, context)


def test_what_megatron_saves_under_any_layout_comes_back(family_dirs, by_megatron, tmp_path):
    """Bitwise; and of a run's checkpoint the weights only, with no need of --hf-config."""
    out = tmp_path / "out"
    run_ranks(2, tmp_path, check_way_back, family_dirs, by_megatron, out)
    for name, family in SAVED:
        assert_same_weights(out / name, family_dirs[family])
    for family, _ in RUNS:
        assert_same_weights(out / f"run-{family}", by_megatron / f"run-{family}-hf")


@pytest.mark.parametrize("name,family", SAVED)
def test_the_description_is_megatrons_own(name, family, converted, by_megatron):
    """Keys, shapes, types and objects; only the vocabulary has no padding."""
    ours, theirs = converted / family, by_megatron / name
    assert described(ours) == described(theirs)
    configs = [json.loads((path / "metadata.json").read_text()) for path in (ours, theirs)]
    # 0.19 has no common.pt of its own any more, and says so here; it still reads one.
    backends = [[config[k] for k in sorted(config) if "sharded" in k] for config in configs]
    assert backends[0] == backends[1]


def described(directory: Path) -> dict[str, object]:
    metadata = metadata_of(directory)
    rows: dict[str, object] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            size = list(entry.size)
            if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                assert size.pop(0) >= 211
            rows[key] = size, entry.properties.dtype
        else:
            info = metadata.storage_data[MetadataIndex(key)]
            stored = (directory / info.relative_path).read_bytes()[info.offset :][: info.length]
            rows[key] = torch.load(io.BytesIO(stored), weights_only=False)
    # 0.19 keeps here what 0.16 has in common.pt: nothing, for a model.
    return {key: row for key, row in rows.items() if not key.startswith("common_state")}


def metadata_of(directory: Path):
    return pickle.loads((directory / ".metadata").read_bytes())


@pytest.fixture(scope="module")
def mcore_dir(converted) -> Path:
    """Of qwen3, in many parts."""
    return converted / "qwen3"


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def edited(source: Path, target: Path, edit: Callable[[dict], object]) -> Path:
    """A copy of a Hugging Face directory with other tensors in its one file."""
    path = copied(source, target) / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def test_dtype_casts(qwen3_dir, tmp_path):
    """On the way there and on the way back, as torch casts; config.json says what it is then."""
    convert(tmp_path, "to-mcore", qwen3_dir, tmp_path / "half", "--dtype", "bfloat16")
    convert(tmp_path, "to-hf", tmp_path / "half", tmp_path / "half-hf")
    convert(tmp_path, "to-hf", tmp_path / "half", tmp_path / "wide", "--dtype", "float32")
    source = load_file(qwen3_dir / "model.safetensors")
    for name, dtype in (("half-hf", "bfloat16"), ("wide", "float32")):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == dtype
        found = load_file(tmp_path / name / "model.safetensors")
        for key, tensor in source.items():
            assert same_bits(found[key], tensor.bfloat16().to(getattr(torch, dtype))), key


def test_a_source_of_two_types_needs_dtype(qwen3_dir, tmp_path):
    def edit(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
        # What older Llama files carry along is no weight, and has no say.
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4).double()

    mixed = edited(qwen3_dir, tmp_path / "mixed", edit)
    text = refused(tmp_path, "to-mcore", mixed, tmp_path / "out")
    assert "46 × torch.float32, 1 × torch.bfloat16" in text and "--dtype" in text
    assert not (tmp_path / "out").exists()
    convert(tmp_path, "to-mcore", mixed, tmp_path / "out", "--dtype", "float32")


def test_shards_are_what_transformers_reads(qwen3_dir, mcore_dir, tmp_path):
    """No file beyond the size, but for one parameter alone; the index names every tensor; the same
    logits to the bit."""
    convert(tmp_path, "to-hf", mcore_dir, tmp_path / "out", "--max-shard-size", SHARD_SIZE)
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == {name: file for file in files for name in files[file]}
    sizes = {file: sum(t.nbytes for t in tensors.values()) for file, tensors in files.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    qkv = {f"{letter}_proj.weight" for letter in "qkv"}
    for file, size in sizes.items():
        assert size <= 60_000 or {name.split("self_attn.")[-1] for name in files[file]} == qkv
    tokens = torch.arange(20)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        for path in (tmp_path / "out", qwen3_dir)
    ]
    assert torch.equal(*logits)


def test_a_snapshot_of_the_hub_is_links_and_becomes_files(qwen3_dir, tmp_path):
    """With what belongs to a model beside its weights; of another format's weights, nothing."""
    blobs, snapshot = copied(qwen3_dir, tmp_path / "blobs"), tmp_path / "snapshot"
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE"):
        (blobs / name).write_text(name)
    (blobs / "pytorch_model.bin").write_text("")
    (blobs / "onnx").mkdir()
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    convert(tmp_path, "to-mcore", snapshot, tmp_path / "out")
    convert(tmp_path, "to-hf", tmp_path / "out", tmp_path / "back")
    found = {path.name for path in (tmp_path / "back").iterdir()}
    assert found == {path.name for path in blobs.iterdir()} - {"pytorch_model.bin", "onnx"}
    assert not any(path.is_symlink() for path in (tmp_path / "back").iterdir())
    assert_same_weights(tmp_path / "back", qwen3_dir)


def drop_a_shard(path):
    (path / "model-00002-of-00005.safetensors").unlink()


def truncate_a_shard(path):
    os.truncate(path / "model-00002-of-00005.safetensors", 1000)


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


BAD_FILES = {
    "missing shard": (drop_a_shard, "model-00002-of-00005.safetensors: no such file"),
    "truncated shard": (truncate_a_shard, "model-00002-of-00005.safetensors: cannot be read"),
    "index": (lambda path: (path / INDEX).write_text("{"), f"{INDEX}: not a safetensors index"),
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json there"),
    "config": (lambda path: (path / "config.json").write_text("{"), "config.json"),
    "family": (
        lambda path: change_config(path, model_type="gpt2"),
        "model_type='gpt2', which is not supported. Supported: llama, qwen2, qwen3, qwen3_moe",
    ),
    "head": (
        lambda path: change_config(path, architectures=["Qwen3ForSequenceClassification"]),
        "is supported as Qwen3ForCausalLM only",
    ),
}


@pytest.fixture(scope="module")
def sharded_dir(qwen3_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(qwen3_dir).save_pretrained(path, max_shard_size="200KB")
    assert len(list(path.glob("*.safetensors"))) == 5
    return path


@pytest.mark.parametrize("damage,message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_hugging_face_directory_is_refused(damage, message, sharded_dir, tmp_path):
    damage(copied(sharded_dir, tmp_path / "bad"))
    assert message in refused(tmp_path, "to-mcore", tmp_path / "bad", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_all_tensors_that_do_not_fit_are_listed(qwen3_dir, tmp_path):
    """Missing, unexpected, of another shape and quantised ones, and not only the first."""

    def edit(tensors):
        for layer in range(4):
            del tensors[f"model.layers.{layer}.self_attn.q_norm.weight"]
        tensors["model.norm.bias"] = torch.zeros(64)
        tensors["lm_head.weight"] = torch.zeros(64, 211)
        tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)

    bad = edited(qwen3_dir, tmp_path / "bad", edit)
    assert refused(tmp_path, "to-mcore", bad, tmp_path / "out").splitlines() == [
        f"error: {bad}: the tensors do not fit config.json:",
        "  model.layers.{0-3}.self_attn.q_norm.weight: missing",
        "  model.norm.weight: type I8 is not supported, only floating point is",
        "  lm_head.weight: shape [64, 211], expected [211, 64]",
        "  model.norm.bias: unexpected, the model has no such weight",
    ]
    assert not list(tmp_path.glob("out*"))


def test_a_tied_head_must_be_the_embedding(tied_qwen3_dir, tmp_path):
    """A copy of it is tolerated, and not written again; anything else is refused."""

    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def spoil(tensors):
        tensors["lm_head.weight"][210, 63] += 1

    def narrow(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()

    same = edited(tied_qwen3_dir, tmp_path / "same", edit)
    for change in (spoil, narrow):
        other = edited(same, tmp_path / change.__name__, change)
        text = refused(tmp_path, "to-mcore", other, tmp_path / "out")
        assert "lm_head.weight: differs from the embedding" in text
    convert(tmp_path, "to-mcore", same, tmp_path / "out")
    convert(tmp_path, "to-hf", tmp_path / "out", tmp_path / "back")
    assert_same_weights(tmp_path / "back", tied_qwen3_dir)


def test_a_source_that_is_nowhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, message in (
        (tmp_path / "typo", "no such directory, and no name on the hub (owner/model)."),
        ("../typo", "no such directory, and no name on the hub (owner/model)."),
        ("owner/typo", "no such directory, and it cannot be had from the hub"),
    ):
        assert f"{name}: {message}" in refused(tmp_path, "to-mcore", name, tmp_path / "out")
    text = refused(tmp_path, "to-hf", tmp_path / "typo", tmp_path / "out")
    assert f"{tmp_path / 'typo'}: no such directory." in text
    assert not list(tmp_path.glob("out*"))


def data_file(path: Path) -> Path:
    return path / "__2_0.distcp"


def garble(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    """An unreadable name in a pickle."""
    path.write_bytes(path.read_bytes().replace(b"decoder.", b"\xffecoder.", 1))


def store_as_bytes(path: Path) -> None:
    metadata = metadata_of(path)
    metadata.state_dict_metadata["output_layer.weight"].properties.dtype = torch.uint8
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


BAD_MEGATRON_FILES = {
    "missing data": (lambda path: data_file(path).unlink(), "__2_0.distcp (missing)"),
    "truncated data": (lambda path: os.truncate(data_file(path), 100), "__2_0.distcp (100 of "),
    "garbled data": (lambda path: garble(data_file(path)), "cannot be loaded"),
    "never finished": (lambda path: (path / ".metadata").unlink(), "no finished Megatron"),
    "no description": (lambda path: (path / "metadata.json").unlink(), "no finished Megatron"),
    "truncated description": (lambda path: os.truncate(path / ".metadata", 999), "cannot be read"),
    "garbled description": (lambda path: flip(path / ".metadata"), "cannot be read"),
    "no config": (lambda path: (path / "config.json").unlink(), "--hf-config"),
    "no weights": (store_as_bytes, "output_layer.weight: type torch.uint8 is not supported"),
}


@pytest.mark.parametrize("damage,message", BAD_MEGATRON_FILES.values(), ids=BAD_MEGATRON_FILES)
def test_a_bad_megatron_checkpoint_is_refused(damage, message, mcore_dir, tmp_path):
    damage(copied(mcore_dir, tmp_path / "bad"))
    assert message in refused(tmp_path, "to-hf", tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*/config.json")), "nothing there looks like a model"


def test_a_checkpoint_of_another_model_is_refused(family_dirs, mcore_dir, tmp_path):
    """With all that is missing, unexpected or of another shape."""
    other = make_model("qwen2_tied", tmp_path / "other", intermediate_size=128)
    text = refused(tmp_path, "to-hf", mcore_dir, tmp_path / "out", "--hf-config", other)
    assert text.splitlines() == [
        f"error: {mcore_dir}: the weights do not fit config.json:",
        "  decoder.layers.self_attention.linear_qkv.bias: missing",
        "  decoder.layers.mlp.linear_fc1.weight: shape [4, 192, 64], expected [4, 256, 64]",
        "  decoder.layers.mlp.linear_fc2.weight: shape [4, 64, 96], expected [4, 64, 128]",
        *(
            f"  {key}: unexpected, the model has no such weight"
            for key in (
                "decoder.layers.self_attention.k_layernorm.weight",
                "decoder.layers.self_attention.q_layernorm.weight",
                "output_layer.weight",
            )
        ),
    ]
    assert not list(tmp_path.glob("out*"))


def test_an_existing_output_stays_unless_it_is_to_be_replaced(qwen3_dir, mcore_dir, tmp_path):
    out = copied(qwen3_dir, tmp_path / "out")
    (out / "stale.txt").write_text("")
    before = contents(out)
    for command, source in (("to-mcore", qwen3_dir), ("to-hf", mcore_dir)):
        text = refused(tmp_path, command, source, out)
        assert f"{out} exists." in text and "--overwrite" in text
    assert contents(out) == before
    convert(tmp_path, "to-mcore", qwen3_dir, out, "--overwrite")
    assert not (out / "stale.txt").exists() and not list(out.glob("*.safetensors"))
    convert(tmp_path, "to-hf", mcore_dir, out, "--overwrite")
    assert_same_weights(out, qwen3_dir)
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_the_source_is_never_replaced(qwen3_dir, mcore_dir, tmp_path):
    """Neither itself nor with a directory that holds it, as checkpoints lie in their run's."""
    hf_dir = copied(qwen3_dir, tmp_path / "models/qwen3")
    run = copied(mcore_dir, tmp_path / "run/checkpoints/000001")
    (tmp_path / "link").symlink_to(run)
    before = contents(tmp_path / "run"), contents(hf_dir)
    for arguments in (
        ("to-mcore", hf_dir, hf_dir),
        ("to-mcore", hf_dir, tmp_path / "models"),
        ("to-hf", run, tmp_path / "link"),
        ("to-hf", tmp_path / "link", tmp_path / "run"),
    ):
        assert "holds the source" in refused(tmp_path, *arguments, "--overwrite")
    assert (contents(tmp_path / "run"), contents(hf_dir)) == before


def test_an_output_that_cannot_be_made_is_refused(qwen3_dir, tmp_path):
    (tmp_path / "file").write_text("kept")
    text = refused(tmp_path, "to-mcore", qwen3_dir, tmp_path / "file/out")
    assert "cannot be written" in text and "Not a directory" in text
    text = refused(tmp_path, "to-mcore", qwen3_dir, tmp_path / "file", "--overwrite")
    assert "is a file" in text and (tmp_path / "file").read_text() == "kept"


def test_paths_are_taken_from_where_the_user_is(qwen3_dir, tmp_path):
    """Relative ones, with a slash at the end, and "." for the directory one stands in."""
    here = copied(qwen3_dir, tmp_path / "here")
    convert(tmp_path, "to-mcore", "./", "../new/mcore/", cwd=here)
    (tmp_path / "out").mkdir()
    assert "exists." in refused(tmp_path, "to-hf", "../new/mcore", ".", cwd=tmp_path / "out")
    convert(tmp_path, "to-hf", "../new/mcore", ".", "--overwrite", cwd=tmp_path / "out")
    assert_same_weights(tmp_path / "out", qwen3_dir)


def contents(directory: Path) -> dict[str, bytes]:
    """All bytes below, but for the random number that torch gives each `.metadata`."""
    files = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    for name in [name for name in files if name.endswith(".metadata")]:
        metadata = pickle.loads(files[name])
        files[name] = pickle.dumps((metadata.state_dict_metadata, metadata.storage_data))
    return files


@pytest.fixture(scope="module")
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_mcore, "PART_BYTES", PART_BYTES)
        yield


@pytest.fixture(params=["to-mcore", "to-hf"])
def job(request, qwen3_dir, mcore_dir, small_parts) -> tuple[object, ...]:
    """A conversion in several files, but for where to."""
    if request.param == "to-mcore":
        return "to-mcore", qwen3_dir
    return "to-hf", mcore_dir, "--max-shard-size", SHARD_SIZE


def test_too_little_space_is_said_before_anything_is_written(job, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=700_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = refused(tmp_path, *job, tmp_path / "out")
    assert "0.00 GB of the disk are free" in text
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.glob("out*/*")] == ["conversion.json"]


def test_a_full_disk_is_an_error_and_the_same_command_goes_on(job, tmp_path):
    """A real refusal of the kernel, in the second file, in which queries, keys and values are."""
    limit = {"to-mcore": 90_000, "to-hf": 62_000}[job[0]]
    text = refused(tmp_path, *job, tmp_path / "out", file_limit=limit)
    assert "cannot be written ([Errno 27] File too large)" in text, os.strerror(errno.EFBIG)
    assert not (tmp_path / "out").exists()
    finished = finished_files(tmp_path / "out.unfinished")
    assert finished
    convert(tmp_path, *job, tmp_path / "out")
    assert_goes_on(finished, tmp_path, job)


def assert_goes_on(finished: dict[str, os.stat_result], tmp_path: Path, job: tuple) -> None:
    """What was finished is the same file, unchanged; and all is as if nothing had happened."""
    for name, before in finished.items():
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), name
    assert not (tmp_path / "out.unfinished").exists()
    convert(tmp_path, *job, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def finished_files(unfinished: Path) -> dict[str, os.stat_result]:
    parts = [f"__{int(path.name[5:10])}_0.distcp" for path in unfinished.glob("part-*.written")]
    files = [path.name for path in unfinished.glob("*.safetensors")]
    return {name: (unfinished / name).stat() for name in (*parts, *files)}


def die_at(module, name: str, call: int, patch: pytest.MonkeyPatch) -> None:
    """SIGKILL, from inside a function, as it is called for that time."""
    original, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    patch.setattr(module, name, dying)


def kill_in_the_middle(job: tuple, tmp_path: Path, calls: int = 12) -> dict[str, os.stat_result]:
    """What is finished when the conversion dies while it reads, or writes, a later tensor."""
    with pytest.MonkeyPatch.context() as patch:
        die_at(to_mcore, "_read", calls, patch)
        die_at(SafetensorsWriter, "write", calls, patch)
        assert cli(tmp_path, *job, tmp_path / "out")[0] == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    return finished_files(tmp_path / "out.unfinished")


def test_a_killed_conversion_goes_on_where_it_stopped(job, tmp_path):
    finished = kill_in_the_middle(job, tmp_path)
    assert len(finished) >= 2
    convert(tmp_path, *job, tmp_path / "out")
    assert_goes_on(finished, tmp_path, job)


def test_other_options_start_anew(job, tmp_path):
    """Nothing of the first conversion is in the second, and so it is the straight one."""
    assert kill_in_the_middle(job, tmp_path)
    convert(tmp_path, *job, tmp_path / "out", "--dtype", "bfloat16")
    convert(tmp_path, *job, tmp_path / "straight", "--dtype", "bfloat16")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_changed_source_starts_anew(job, qwen3_dir, tmp_path):
    """Other weights; or the same ones, taken for heads of another size by another config.json."""
    command, source, *options = job
    source = copied(source, tmp_path / "source")
    kill_in_the_middle((command, source, *options), tmp_path)
    if command == "to-mcore":
        shutil.rmtree(source)
        make_model("qwen3", source, seed=7)
    else:
        change_config(source, rms_norm_eps=1e-5)
    before = (tmp_path / "out.unfinished" / "conversion.json").read_text()
    kill_in_the_middle((command, source, *options), tmp_path, calls=1)
    assert (tmp_path / "out.unfinished" / "conversion.json").read_text() != before
    assert not finished_files(tmp_path / "out.unfinished")


def test_a_rank_that_comes_late_gets_its_share(family_dirs, tmp_path, monkeypatch, small_parts):
    """What the first rank has finished by then is not taken for the work of an earlier start."""

    class Late(MCoreWriter):
        def __init__(self, *args) -> None:
            time.sleep(0.5 * int(os.environ["RANK"]))
            super().__init__(*args)

    monkeypatch.setattr(to_mcore, "MCoreWriter", Late)
    convert(tmp_path, "to-mcore", family_dirs["qwen2"], tmp_path / "out", ranks=2)
    monkeypatch.undo()
    convert(tmp_path, "to-hf", tmp_path / "out", tmp_path / "back")
    assert_same_weights(tmp_path / "back", family_dirs["qwen2"])


def test_the_error_of_one_rank_ends_all(mcore_dir, tmp_path, monkeypatch):
    """It is said once, and nobody waits for the rank that has it."""
    original = SafetensorsWriter.write

    def failing(writer, tensor):
        if os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(writer, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    job = ("to-hf", mcore_dir, tmp_path / "out", "--max-shard-size", SHARD_SIZE)
    text = refused(tmp_path, *job, ranks=2)
    assert text.count("No space left on device") == 1
    assert not (tmp_path / "out").exists()


def test_check_finds_no_difference(qwen3_dir, mcore_dir, tmp_path):
    """On four ranks, logits included; and of a conversion to bfloat16 none but the cast."""
    cut = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
    text = convert(tmp_path, "check", qwen3_dir, mcore_dir, *cut, ranks=4)
    assert "tensors: 0 of 47 differ" in text and "TP 2 × PP 2" in text
    convert(tmp_path, "to-mcore", qwen3_dir, tmp_path / "half", "--dtype", "bfloat16")
    assert "tensors: 0 of 47 differ" in convert(tmp_path, "check", qwen3_dir, tmp_path / "half")


def test_check_names_the_one_element_that_differs(family_dirs, tmp_path):
    """By one bit: exit code 1, and logits that are still the same."""
    name = "model.layers.2.mlp.experts.5.up_proj.weight"

    def edit(tensors):
        tensors[name].view(torch.int32)[3, 4] += 1

    hf_dir = family_dirs["qwen3_moe"]
    convert(tmp_path, "to-mcore", edited(hf_dir, tmp_path / "bad", edit), tmp_path / "mcore")
    code, text = cli(tmp_path, "check", hf_dir, tmp_path / "mcore")
    assert code == 1
    assert re.search(rf"different\n{re.escape(name)} .* 1 of 3,072\n", text)
    assert "tensors: 1 of 135 differ" in text and re.search(r"largest difference \d\.\d+e-06", text)


def test_check_calls_equal_what_has_the_same_bits(qwen3_dir, tmp_path):
    """NaN for NaN in a tensor; but logits of NaN agree with nothing."""

    def edit(tensors):
        tensors["model.norm.weight"][0] = float("nan")

    hf_dir = edited(qwen3_dir, tmp_path / "nan", edit)
    convert(tmp_path, "to-mcore", hf_dir, tmp_path / "mcore")
    convert(tmp_path, "check", hf_dir, tmp_path / "mcore", "--no-logits")
    code, text = cli(tmp_path, "check", hf_dir, tmp_path / "mcore")
    assert code == 1 and "tensors: 0 of 47 differ" in text and "difference inf" in text


def test_check_refuses_before_it_compares(qwen3_dir, mcore_dir, tmp_path):
    cut = ("--tensor-model-parallel-size", 4)
    text = refused(tmp_path, "check", qwen3_dir, mcore_dir, *cut, ranks=4)
    assert "does not divide the model's num_key_value_heads=2" in text
    assert "worst tensors" not in text


@pytest.mark.parametrize(
    "found,expected,largest,num_different",
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0, 0),
        ([1.0, 2.5], [1.0, 2.0], 0.5, 1),
        ([-0.0, 2.0], [0.0, 2.0], 0.0, 1),
        ([float("nan"), 2.0], [float("nan"), 2.5], 0.5, 1),
        ([float("nan"), 2.0], [1.0, 2.5], float("inf"), 2),
        ([float("inf"), 2.0], [float("inf"), 2.0], 0.0, 0),
        ([float("inf"), 2.0], [float("-inf"), 2.0], float("inf"), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_differences_are_of_bits(dtype, found, expected, largest, num_different):
    one, other = (torch.tensor([row], dtype=dtype) for row in (expected, found))
    difference = difference_of("name", one, other)
    assert (difference.largest, difference.num_different) == (largest, num_different)


HIDDEN, FFN, VOCAB, LAYERS = 1024, 3072, 8192, 11
LARGEST_GROUP = 2 * VOCAB * HIDDEN


def make_large_model(path: Path) -> int:
    """bfloat16, about 300 MB, of which no parameter is more than 17. Returns its bytes."""
    config = Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        vocab_size=VOCAB,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        tensors = Qwen3ForCausalLM(config).state_dict()
    path.mkdir()
    config.save_pretrained(path)
    specs = [TensorSpec(name, "bfloat16", tuple(t.shape)) for name, t in tensors.items()]
    planned = PlannedFile("model.safetensors", tuple(specs))
    with SafetensorsWriter(path, planned) as writer:
        for number, spec in enumerate(specs):
            writer.write(torch.full(spec.shape, float(number)))
    return planned.num_bytes


def check_memory(step, small, large, allowed):
    context = context_for(1, 1)
    step(*small, context)  # imports what is imported late
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    base = status("VmRSS")
    step(*large, context)
    added = status("VmHWM") - base
    assert added < allowed, f"{added:,} bytes, {allowed:,} are allowed"


def status(field: str) -> int:
    """Bytes. Not getrusage, whose peak a process takes over from the one that started it."""
    line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) * 1024


def test_memory_does_not_grow_with_the_model(qwen3_dir, tmp_path, monkeypatch):
    """What a conversion adds to the process is a parameter and a half, and buffers of fixed sizes,
    which are made small here: a chunk of each of the 6 keys that torch's writer keeps until a file
    is complete, one on its way, the rows being copied, and what is mapped of the source."""
    buffer = 2 * 2**20
    monkeypatch.setattr(mcore_writer, "CHUNK_BYTES", buffer)
    monkeypatch.setattr(hf_weights, "READ_BYTES", buffer)
    monkeypatch.setattr(hf_files, "_MAPPED_BYTES", buffer)
    num_bytes = make_large_model(tmp_path / "large")
    assert num_bytes > 15 * LARGEST_GROUP
    # 16 MiB for what the allocator keeps between two parameters.
    allowed = 3 * LARGEST_GROUP // 2 + 10 * buffer + 16 * 2**20
    names = {"small": qwen3_dir, "large": tmp_path / "large"}
    jobs = [(path, tmp_path / f"{name}-mcore", None, False) for name, path in names.items()]
    run_ranks(1, tmp_path, check_memory, to_mcore.to_mcore, *jobs, allowed)
    jobs = [
        (tmp_path / f"{name}-mcore", tmp_path / f"{name}-hf", None, None, 10**9, False)
        for name in names
    ]
    run_ranks(1, tmp_path, check_memory, to_hf.to_hf, *jobs, allowed)
    found = load_file(tmp_path / "large-hf/model.safetensors")
    expected = load_file(tmp_path / "large/model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
