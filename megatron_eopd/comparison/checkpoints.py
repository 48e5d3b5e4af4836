"""Checkpoints of two runs, tensor by tensor, whatever the layouts that wrote them."""

import io
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_eopd.checkpoints import files
from megatron_eopd.comparison.parts import Part, Run, same
from megatron_eopd.comparison.tensors import Extent, keys_alone, worst_first
from megatron_eopd.errors import ConfigError
from megatron_eopd.models.mcore_files import MCoreCheckpoint, read_metadata

PADDED = re.compile(r"(word_embeddings|output_layer)\.weight$")
"""Tensors that end with rows of padding, more of them at a larger tensor-parallel size."""
COMPARED = ("torch", "device", "megatron")
"""Random states that are compared. Python's and numpy's are the whole process's, from which any
library may draw."""


def compare_checkpoints(a: Run, b: Run, rtol: float, iteration: int | None) -> Part:
    part, found = Part("checkpoints"), [_chosen(run, iteration) for run in (a, b)]
    first, second = found
    if first is None or second is None:
        part.summary = "none"
        part.problems = [
            f"only {run.label} has one" for run, own in zip((a, b), found, strict=True) if own
        ]
    elif first.name != second.name:
        part.summary = "not of one iteration; choose one with --iteration"
        part.problems = [f"the newest are A {first.name}, B {second.name}"]
    else:
        problems, count = _compare_tensors(first, second, rtol)
        part.problems = [*problems, *_compare_positions(first, second, rtol)]
        part.summary = f"{first.name}, {count} tensors"
    return part


def _chosen(run: Run, iteration: int | None) -> Path | None:
    if iteration is None:
        return files.newest(run.path)
    path, complete = files.checkpoint_dir(run.path, iteration), files.complete(run.path)
    if path not in complete:
        there = ", ".join(p.name for p in complete) or "none"
        raise ConfigError(f"--iteration {iteration}: no complete {path}. There are {there}.")
    return path


class _Stored:
    """The tensors and random states of a checkpoint, by key."""

    def __init__(self, path: Path) -> None:
        self.content = MCoreCheckpoint(path)
        described = read_metadata(path).state_dict_metadata
        self.tensors = {k: v for k, v in described.items() if isinstance(v, TensorStorageMetadata)}
        self.random = {key for key in described if key.startswith("rng/")}

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)


def _compare_tensors(a: Path, b: Path, rtol: float) -> tuple[list[str], int]:
    """(problems, tensors in either)."""
    x, y = _Stored(a), _Stored(b)
    problems = keys_alone("A", x.tensors.keys() - y.tensors.keys())
    problems += keys_alone("B", y.tensors.keys() - x.tensors.keys())
    off = []
    for key in sorted(x.tensors.keys() & y.tensors.keys()):
        shapes = x.shape(key), y.shape(key)
        if not _same_but_for_padding(key, *shapes):
            problems.append(f"{key}: shape A {list(shapes[0])}, B {list(shapes[1])}")
        elif (difference := _difference(key, x, y)) > rtol:
            off.append((difference, key))
    problems += worst_first(off)
    if x.random == y.random:  # another layout has other ranks
        problems += [f"{key}: another state" for key in sorted(x.random) if _moved(key, x, y)]
    return problems, len(x.tensors.keys() | y.tensors.keys())


def _same_but_for_padding(key: str, x: tuple[int, ...], y: tuple[int, ...]) -> bool:
    return x == y or (PADDED.search(key) is not None and x[1:] == y[1:])


def _difference(key: str, x: _Stored, y: _Stored) -> float:
    """Relative, reading one stored piece at a time, as the first has them."""
    extent, stored = Extent(), x.tensors[key]
    shapes = x.shape(key), y.shape(key)
    rows = min((shape[0] for shape in shapes if shape), default=0)
    for chunk in stored.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        if offsets and offsets[0] + sizes[0] > rows:  # padding that the other has not
            sizes = (max(rows - offsets[0], 0), *sizes[1:])
        if 0 in sizes:
            continue
        ask = ShardedTensor(key, None, stored.properties.dtype, sizes, shapes[0], offsets, None)
        theirs = replace(ask, global_shape=shapes[1])
        extent.add(x.content.read(ask), y.content.read(theirs))
    return extent.relative


def _moved(key: str, x: _Stored, y: _Stored) -> bool:
    """Whether a rank's random states differ."""
    try:
        a, b = (
            torch.load(io.BytesIO(stored.content.read_object(key)), weights_only=True)
            for stored in (x, y)
        )
    except pickle.UnpicklingError:  # of format 1, which only code that may do anything could read
        return False
    if not (isinstance(a, dict) and isinstance(b, dict)):  # the same
        return False
    return any(not _same_states(a[name], b[name]) for name in COMPARED)


def _same_states(x: Any, y: Any) -> bool:
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_same_states(x[name], y[name]) for name in x)
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def _compare_positions(a: Path, b: Path, rtol: float) -> Iterator[str]:
    """Apart from the layout; and the optimizer's options and steps, where they lie beside."""
    x, y = (json.loads((path / "position.json").read_text()) for path in (a, b))
    for name in sorted((x.keys() | y.keys()) - {"layout"}):
        if not same(x.get(name), y.get(name), rtol):
            yield f"position.json, {name}: A {x.get(name)!s:.60}, B {y.get(name)!s:.60}"
    common = [path / "common.pt" for path in (a, b)]
    if all(path.is_file() for path in common):
        x, y = (torch.load(path, weights_only=True).get("optimizer") for path in common)
        if not same(x, y, rtol):
            yield "common.pt: the optimizer's options or steps differ"
