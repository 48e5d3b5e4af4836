"""Which directory the path of a model means, where it may be a root that Megatron-LM saves into.

Megatron-LM's `--save ROOT` makes ROOT/iter_0000100 or ROOT/release, and a tracker file beside them
that names the newest. Nothing of a checkpoint is opened here, so everybody may ask.
"""

import json
from pathlib import Path

from megatron_eopd.errors import CheckpointError, ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def iteration_name(iteration: int | None) -> str:
    """Of a checkpoint below its root; None is a release, which has no iteration."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def resolve_checkpoint(path: Path) -> Path:
    """The directory that has the weights: `path` itself, or the one that its tracker names.

    Raises:
        CheckpointError: the tracker says nothing, or names what is not there; there are several
            checkpoints and no tracker; or the format is none that is read here.
    """
    path = Path(path)
    tracker = path / TRACKER
    found = path
    if tracker.is_file() and not is_mcore(path):
        found = _tracked(path, tracker)
    elif not is_mcore(path) and not is_hugging_face(path) and (saved := checkpoints_in(path)):
        raise CheckpointError(
            f"{path}: holds {', '.join(saved)} and no {TRACKER} that names one of them. Give the "
            f"one that is meant, for instance {path / saved[-1]}."
        )
    _refuse_other_formats(found)
    return found


def resolve_model(path: Path) -> Path:
    """What a run takes for its model's directory: the one with config.json and the tokenizer.

    A root that alone has them stays the root, and `resolve_checkpoint` finds its weights.

    Raises:
        CheckpointError: as `resolve_checkpoint`.
    """
    root, weights = Path(path), resolve_checkpoint(path)
    only_in_root = not has_config(weights) and has_config(root)
    return root if only_in_root else weights


def config_dir_of(path: Path) -> Path:
    """Where config.json and the tokenizer of a Megatron checkpoint are: beside the weights, or in
    the root above them.

    Raises:
        ConfigError: no such directory, or none there.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory.")
    weights = resolve_checkpoint(path)
    below_root = weights.name in checkpoints_in(weights.parent)
    for place in (weights, *[weights.parent][: int(below_root)]):
        if has_config(place):
            return place
    raise ConfigError(
        f"{weights}: no config.json beside the weights. Give the directory that has it (and the "
        f"tokenizer) with --hf-config."
    )


def has_config(path: Path) -> bool:
    return (path / "config.json").is_file()


def is_mcore(path: Path) -> bool:
    """Whether the directory is a Megatron checkpoint, complete or not."""
    return (Path(path) / "metadata.json").is_file() or (Path(path) / ".metadata").is_file()


def is_hugging_face(path: Path) -> bool:
    """Whether weights as transformers saves them lie there, readable here or not."""
    return any(
        next(Path(path).glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin")
    )


def checkpoints_in(path: Path) -> list[str]:
    """Names of what Megatron-LM may have saved there, the newest last."""
    saved = [p.name for p in Path(path).glob("iter_*") if p.is_dir()]
    return [RELEASE] * (Path(path) / RELEASE).is_dir() + sorted(saved)


def _tracked(root: Path, tracker: Path) -> Path:
    text = tracker.read_text(errors="replace").strip()
    if text != RELEASE and not (text.isascii() and text.isdigit()):
        raise CheckpointError(
            f"{tracker}: says {text!r}, where an iteration or {RELEASE!r} should be. Give the "
            f"checkpoint itself{_named(root)}."
        )
    found = root / iteration_name(None if text == RELEASE else int(text))
    if not found.is_dir():
        raise CheckpointError(
            f"{tracker}: names {text}, but there is no {found}. Copy it there, or give another "
            f"checkpoint{_named(root)}."
        )
    return found


def _named(root: Path) -> str:
    saved = checkpoints_in(root)
    return f", one of {', '.join(str(root / name) for name in saved)}" if saved else ""


def _refuse_other_formats(path: Path) -> None:
    legacy = [path / "model_optim_rng.pt", *sorted(path.glob("mp_rank_0*/model_optim_rng.pt"))]
    found = [file for file in legacy if file.is_file()]
    if found:
        raise CheckpointError(
            f"{path}: is a Megatron-LM checkpoint of the legacy format 'torch' "
            f"({found[-1].relative_to(path)}), a pickle of one parallel layout that is not read "
            f"here. Start Megatron-LM's own training script with the arguments it was trained with "
            f"and --ckpt-convert-format torch_dist --ckpt-convert-save DIR, and give DIR."
        )
    if _backend(path) == "zarr" or next(path.glob("*/.zarray"), None):
        states = sorted(p.name for p in path.glob("optimizer*") if p.is_dir())
        also = f", with {len(states)} directories of optimizer state" if states else ""
        raise CheckpointError(
            f"{path}: is a Megatron-LM checkpoint of the format 'zarr'{also}, which is not read "
            f"here. Load it with a Megatron-LM that still has it, and save it with --ckpt-format "
            f"torch_dist."
        )


def _backend(path: Path) -> str | None:
    """What metadata.json says of the format; a damaged one says nothing here."""
    try:
        return json.loads((path / "metadata.json").read_text()).get("sharded_backend")
    except (OSError, ValueError, AttributeError):
        return None
