"""A path of a model: the directory itself, or the one that Megatron-LM's tracker file names."""

import json
from pathlib import Path

import pytest

from megatron_eopd.config import load_config
from megatron_eopd.errors import CheckpointError, ConfigError
from megatron_eopd.model_paths import config_dir_of, resolve_checkpoint, resolve_model

TRACKER = "latest_checkpointed_iteration.txt"


def make_root(root: Path, *names: str, tracker: str | None = None) -> Path:
    """With checkpoints of these names, which have a description and nothing else."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    root.mkdir(exist_ok=True)
    if tracker is not None:
        (root / TRACKER).write_text(tracker)
    return root


@pytest.mark.parametrize(
    "text,name",
    [("100", "iter_0000100"), ("release\n", "release"), (" 12345678 ", "iter_12345678")],
)
def test_the_tracker_is_followed(text, name, tmp_path):
    root = make_root(tmp_path / "root", "iter_0000100", "iter_12345678", "release", tracker=text)
    assert resolve_checkpoint(root) == root / name == resolve_model(root)


def test_what_has_weights_itself_is_itself(tmp_path):
    """Whatever lies beside them; and so is what does not exist, of which others speak."""
    root = make_root(tmp_path / "root", "iter_0000100", tracker="100")
    hugging_face = make_root(tmp_path / "hf", "iter_0000100")
    (hugging_face / "model.safetensors").touch()
    for path in (root / "iter_0000100", hugging_face, tmp_path / "nowhere"):
        assert resolve_checkpoint(path) == path


@pytest.mark.parametrize("text", ["", "\n", "latest", "-1", "1.5", "²", "iter_0000100"])
def test_a_tracker_of_nonsense_is_refused(text, tmp_path):
    root = make_root(tmp_path, "iter_0000050", "iter_0000100", tracker=text)
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint(root)
    assert f"{root / TRACKER}: says {text.strip()!r}" in str(error.value)
    assert f"one of {root / 'iter_0000050'}, {root / 'iter_0000100'}." in str(error.value)


def test_a_tracker_that_names_what_is_not_there_is_refused(tmp_path):
    root = make_root(tmp_path, "iter_0000050", tracker="100")
    with pytest.raises(CheckpointError, match=r"there is no .*iter_0000100\. .*/iter_0000050\.$"):
        resolve_checkpoint(root)


def test_without_a_tracker_the_user_chooses(tmp_path):
    """Also where there is but one: it may be what an interruption left."""
    root = make_root(tmp_path, "iter_0000050", "iter_0000100", "release")
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint(root)
    assert "holds release, iter_0000050, iter_0000100 and no latest_" in str(error.value)
    assert str(root / "iter_0000100") in str(error.value)


def test_configuration_is_beside_the_weights_or_in_the_root(tmp_path):
    root = make_root(tmp_path / "root", "iter_0000050", "iter_0000100", tracker="100")
    with pytest.raises(ConfigError, match=r"iter_0000100: no config\.json beside the weights"):
        config_dir_of(root)
    (root / "config.json").write_text("{}")
    for path in (root, root / "iter_0000050", root / "iter_0000100"):
        assert config_dir_of(path) == root
    assert resolve_model(root) == root, "which has the tokenizer too"
    (root / "iter_0000100/config.json").write_text("{}")
    assert config_dir_of(root) == resolve_model(root) == root / "iter_0000100"


def test_a_directory_is_no_root_because_it_is_above(tmp_path):
    """Another model's config.json is not taken for that of a checkpoint in a folder of its own."""
    root = make_root(tmp_path / "models", "mine")
    (root / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"mine: no config\.json"):
        config_dir_of(root / "mine")


@pytest.mark.parametrize("name", ["mp_rank_00", "mp_rank_00_000", "mp_rank_00_000_000"])
@pytest.mark.parametrize("given", ["root", "root/iter_0000100", "root/iter_0000100/RANK"])
def test_the_legacy_format_is_named(given, name, tmp_path):
    root = make_root(tmp_path / "root", tracker="100")
    (root / "iter_0000100" / name).mkdir(parents=True)
    (root / "iter_0000100" / name / "model_optim_rng.pt").touch()
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint(tmp_path / given.replace("RANK", name))
    assert "legacy format 'torch'" in str(error.value)
    assert "--ckpt-convert-format torch_dist --ckpt-convert-save DIR" in str(error.value)


@pytest.mark.parametrize("by", ["metadata.json", "files"])
def test_zarr_is_named_with_its_optimizer(by, tmp_path):
    for name in ("decoder.final_layernorm.weight", "optimizer.state.exp_avg.decoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / (".zarray" if by == "files" else "0")).touch()
    if by == "metadata.json":
        text = json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1})
        (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(CheckpointError, match="format 'zarr', with 1 directories of optimizer"):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize("section", ["student", "teacher", "teachers.other"])
def test_a_run_resolves_its_models_as_it_reads_its_options(section, tmp_path):
    """Once, so that config.json of the run says which checkpoint it was."""
    root = make_root(tmp_path / "root", "iter_0000100", tracker="100")
    toml = tmp_path / "run.toml"
    toml.write_text(
        'run_dir = "x"\ndata.prompts = "countdown"\nstudent.hf_path = "s"\n'
        'teacher.hf_path = "t"\nteachers.other.hf_path = "o"\n'
    )
    config = load_config(toml, [f"{section}.hf_path={root}"])
    models = {"student": config.student, "teacher": config.teacher}
    models |= {f"teachers.{name}": teacher for name, teacher in config.teachers.items()}
    assert models[section].hf_path == root / "iter_0000100"
    (root / TRACKER).write_text("")
    with pytest.raises(ConfigError, match=rf"^{section}\.hf_path: .*{TRACKER}: says ''"):
        load_config(toml, [f"{section}.hf_path={root}"])
