"""Hugging Face exports of two runs, tensor by tensor."""

import math
from pathlib import Path

from safetensors import safe_open

from megatron_eopd.comparison.parts import Part, Run
from megatron_eopd.comparison.tensors import Extent, keys_alone, worst_first


def compare_exports(a: Run, b: Run, rtol: float) -> Part:
    part, (x, y) = Part("hf"), [_files_of(run.path / "hf") for run in (a, b)]
    part.problems += keys_alone("A", x.keys() - y.keys()) + keys_alone("B", y.keys() - x.keys())
    differences = [(_difference(name, x[name], y[name]), name) for name in x.keys() & y.keys()]
    part.problems += worst_first([each for each in differences if each[0] > rtol])
    count = len(x.keys() | y.keys())
    part.summary = f"{count} tensors" if count else "none"
    return part


def _files_of(directory: Path) -> dict[str, Path]:
    """By the names of the tensors in them."""
    found: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _difference(name: str, a: Path, b: Path) -> float:
    """Relative; infinite of two shapes or types."""
    with safe_open(a, "pt") as file_a, safe_open(b, "pt") as file_b:
        x, y = file_a.get_tensor(name), file_b.get_tensor(name)
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return math.inf
    extent = Extent()
    extent.add(x, y)
    return extent.relative
