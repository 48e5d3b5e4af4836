#!/usr/bin/env python3
"""Copy a Hugging Face model directory without some of its decoder layers.

What is left is renumbered, in the weights and in config.json; tokenizer and generation files are
copied. A quick way to a student that is smaller than its teacher and shares its vocabulary: it has
to be trained before its text means anything. Tensors pass through one at a time.
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_eopd.errors import CheckpointError, ConfigError
from megatron_eopd.models.families import family_of
from megatron_eopd.models.hf_files import (
    HFCheckpoint,
    SafetensorsWriter,
    copy_side_files,
    name_files,
    plan_files,
    write_index_and_config,
)
from megatron_eopd.weight_sync.manifest import TensorSpec

EXAMPLES = """examples:
  python tools/drop_layers.py models/SmolLM2-135M-Instruct models/student --layers 20-23,25,27
      24 layers of 30; the first is 0, and ranges include both ends
  python tools/drop_layers.py /models/Qwen3-1.7B models/half --layers 1,3,5,7,9,11,13,15,17,19,21
      17 layers of 28; the ends are kept
"""
MAX_FILE_BYTES = 5 * 1000**3
DTYPES = ("bfloat16", "float16", "float32")
LAYER_OF_NAME = re.compile(r"(?<=^model\.layers\.)\d+")
OUTSIDE = -1  # of the layers: embedding, last norm, head
# Of config.json: two by layer, and three that may by chance be as long as there are layers.
KNOWN_LISTS = {"layer_types", "mlp_only_layers", "architectures", "bos_token_id", "eos_token_id"}


def drop_layers(hf_dir: Path, out_dir: Path, layers: str) -> str:
    """Write `out_dir`, in one piece or not at all; gives back what was done, in two lines.

    layers: those to leave out, counted from 0, as in "20-23,25".

    Raises:
        ConfigError: the layers, the model or `out_dir` cannot be used.
        CheckpointError: a weight file is missing or damaged.
    """
    if out_dir.exists():
        raise ConfigError(f"{out_dir} exists. Give another directory.")
    config = read_config(hf_dir)
    num_layers = config["num_hidden_layers"]
    kept = kept_layers(layers, num_layers)
    new_config = config_of(kept, config)
    unfinished = out_dir.with_name(out_dir.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        with HFCheckpoint(hf_dir) as checkpoint:
            before, after = write_model(checkpoint, kept, num_layers, new_config, unfinished)
        unfinished.rename(out_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return f"layers      {num_layers:>15,} → {len(kept):,}\nparameters  {before:>15,} → {after:,}"


def read_config(hf_dir: Path) -> dict[str, Any]:
    """config.json of a family that the trainer knows.

    Raises:
        ConfigError: there is none, or it is of another family.
    """
    path = hf_dir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{hf_dir}: no config.json there. Give a Hugging Face model directory.")
    try:
        config = json.loads(path.read_text())
        family_of(config.get("model_type"))
    except (ValueError, AttributeError) as error:  # AttributeError: JSON, and no object
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config.get("num_hidden_layers"), int):
        raise ConfigError(f"{path}: no num_hidden_layers. Copy the file again.")
    return config


def kept_layers(text: str, num_layers: int) -> list[int]:
    """The layers of a model that "20-23,25" leaves, by their numbers before.

    Raises:
        ConfigError: it is no such list, names a layer that there is not, none, or all.
    """
    dropped: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f"--layers {text}: {part!r} is no layer or range. Write 20-23,25.")
        dropped.update(range(first, last + 1))
    if not dropped:
        raise ConfigError("--layers names no layer, so nothing would be dropped. Write 20-23,25.")
    if max(dropped) >= num_layers:
        raise ConfigError(
            f"--layers {text}: there is no layer {max(dropped)}. The model has layers 0 to "
            f"{num_layers - 1}."
        )
    if len(dropped) == num_layers:
        raise ConfigError(f"--layers {text}: none of {num_layers} layers is left. Name fewer.")
    return [layer for layer in range(num_layers) if layer not in dropped]


def config_of(kept: Sequence[int], config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the model with these layers.

    Raises:
        ConfigError: it says something by layer that is not known here.
    """
    num_layers = config["num_hidden_layers"]
    new = config | {"num_hidden_layers": len(kept)}
    if len(config.get("layer_types") or ()) == num_layers:
        new["layer_types"] = [config["layer_types"][layer] for layer in kept]
    elif config.get("use_sliding_window"):
        raise ConfigError(
            f"config.json has use_sliding_window=true and no layer_types by layer: the windows "
            f"follow from max_window_layers={config.get('max_window_layers')}, which is not "
            f"supported. Add layer_types, {num_layers} entries."
        )
    if "decoder_sparse_step" in config or "mlp_only_layers" in config:
        # Every nth layer has experts, but for those listed: of the rest a list alone remains true.
        step, listed = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
        dense = [n for n, layer in enumerate(kept) if layer in listed or (layer + 1) % step]
        new |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == num_layers and key not in KNOWN_LISTS:
            raise ConfigError(
                f"config.json: {key} has {num_layers} entries, as many as there are layers. What "
                f"it means by layer is not known; remove it if it means nothing."
            )
    return new


def write_model(
    checkpoint: HFCheckpoint,
    kept: Sequence[int],
    num_layers: int,
    config: dict[str, Any],
    directory: Path,
) -> tuple[int, int]:
    """Weights, side files and config.json; gives back the parameters before and after."""
    old_name = renamed(checkpoint, kept, num_layers)
    specs = [spec_of(checkpoint, old, new) for new, old in old_name.items()]
    files = name_files(plan_files([[spec] for spec in specs], MAX_FILE_BYTES))
    with tqdm(total=len(specs), desc=directory.stem, unit="tensor") as bar:
        for planned in files:
            with SafetensorsWriter(directory, planned) as writer:
                for spec in planned.specs:
                    writer.write(checkpoint.slice(old_name[spec.name])[:])
                    bar.update()
    copy_side_files(checkpoint.path, directory)
    (directory / "config.json").write_text(json.dumps(config))
    write_index_and_config(directory, files)
    before = sum(math.prod(checkpoint.slice(name).shape) for name in checkpoint.names())
    return before, sum(math.prod(spec.shape) for spec in specs)


def renamed(checkpoint: HFCheckpoint, kept: Sequence[int], num_layers: int) -> dict[str, str]:
    """New name → old name of every tensor that stays, layer by layer.

    Raises:
        ConfigError: the weights are of another number of layers than config.json says.
    """
    layer_of = {name: layer_in(name) for name in checkpoint.names()}
    wrong = set(layer_of.values()) ^ {OUTSIDE, *range(num_layers)}
    if wrong:
        raise ConfigError(
            f"{checkpoint.path}: config.json says num_hidden_layers={num_layers}, and the weights "
            f"have {'a' if min(wrong) >= num_layers else 'no'} model.layers.{min(wrong)}. Correct "
            f"config.json, or copy the weights again."
        )
    number = {OUTSIDE: OUTSIDE} | {layer: n for n, layer in enumerate(kept)}
    names = sorted((number[layer], old) for old, layer in layer_of.items() if layer in number)
    return {LAYER_OF_NAME.sub(str(n), old): old for n, old in names}


def layer_in(name: str) -> int:
    match = LAYER_OF_NAME.search(name)
    return int(match[0]) if match else OUTSIDE


def spec_of(checkpoint: HFCheckpoint, old: str, new: str) -> TensorSpec:
    """A tensor under its new name."""
    tensor = checkpoint.slice(old)
    dtype = str(tensor[:0].dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(
            f"{checkpoint.path}: {old} has type {dtype}. Only {', '.join(DTYPES)} are supported: "
            f"give a model that is not quantised."
        )
    return TensorSpec(new, dtype, tensor.shape)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="Hugging Face directory")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="directory to make")
    parser.add_argument(
        "--layers", required=True, metavar="LIST", help="layers to leave out: 20-23,25"
    )
    arguments = parser.parse_args(argv)
    try:
        print(drop_layers(arguments.hf_dir, arguments.out_dir, arguments.layers))
    except (ValueError, OSError, CheckpointError) as error:  # a ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
