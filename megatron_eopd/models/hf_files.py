"""A Hugging Face model directory on disk: reading its tensors slice by slice, and writing one.

What is written is planned first, from names, types and shapes alone: which tensor goes into which
file and where. So files are written front to back without ever holding one in memory, by several
ranks at once, and a file that is already complete is known by its name.
"""

import json
import os
import re
import shutil
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_eopd.errors import CheckpointError
from megatron_eopd.weight_sync.manifest import TensorSpec

INDEX = "model.safetensors.index.json"
_MAPPED_BYTES = 64 * 2**20
_WRITE_ELEMENTS = 16 * 2**20
_SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".py"}
# Of this format, of Megatron's, and of a run's checkpoint.
_ABOUT_WEIGHTS = {INDEX, "pytorch_model.bin.index.json", "metadata.json"}
# Of a run's checkpoint.
_ABOUT_WEIGHTS |= {"position.json", "checksums.json", "run_config.json", "reports.json"}
_WEIGHTS = (INDEX, "*.safetensors", "pytorch_model*.bin", "consolidated*.pth", "*.gguf")
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class TensorSlice:
    """A tensor in a file; data is read when a part is taken, as `tensor[rows, columns]`."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it, e.g. "BF16"."""
    read: Callable[[Any], torch.Tensor]

    def __getitem__(self, part: Any) -> torch.Tensor:
        return self.read(part)


class HFCheckpoint:
    """The safetensors files of a directory, read slice by slice.

    Raises:
        CheckpointError: a file is missing or damaged. Every file's header is read at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._open_files: dict[str, safe_open] = {}
        self._bytes_read = 0
        self._file_of: dict[str, str] = {}
        listed = self._weight_map()
        for file in sorted(set(listed.values())) or [_only_file(self.path)]:
            self._file_of |= dict.fromkeys(self._open(file).keys(), file)
        lost = [f"{name} (in {file})" for name, file in listed.items() if name not in self._file_of]
        if lost:
            raise CheckpointError(
                f"{self.path}: tensors that {INDEX} names are not in its files:\n{listing(lost)}"
            )

    def __enter__(self) -> "HFCheckpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open_files.clear()

    def names(self) -> set[str]:
        return set(self._file_of)

    def slice(self, name: str) -> TensorSlice:
        found = self._open(self._file_of[name]).get_slice(name)
        return TensorSlice(tuple(found.get_shape()), found.get_dtype(), partial(self._read, name))

    def _read(self, name: str, part: Any) -> torch.Tensor:
        tensor = self._open(self._file_of[name]).get_slice(name)[part]
        self._bytes_read += tensor.nbytes
        if self._bytes_read > _MAPPED_BYTES:
            # The files are mapped, and every page that was ever read counts as this process's.
            self._open_files.clear()
            self._bytes_read = 0
        return tensor

    def count_dtypes(self, names: Iterable[str]) -> dict[torch.dtype, int]:
        """How many of these tensors there are of each type."""
        dtypes = {code: getattr(torch, name) for name, code in _SAFETENSORS_DTYPES.items()}
        return Counter(dtypes[self.slice(name).dtype] for name in names)

    def fingerprint(self) -> list:
        """Changes when a weight file does."""
        return fingerprint(self.path / file for file in set(self._file_of.values()))

    def check(self, shapes: dict[str, tuple[int, ...]], asked_for: set[str], *, tied: bool) -> None:
        """Compare with what config.json asks for: these shapes, and no name but `asked_for`.

        Raises:
            CheckpointError: listing every tensor that is missing, unexpected, of another shape, or
                no floating point (quantised weights mean nothing without their scales).
        """
        problems = [p for name, shape in shapes.items() if (p := self._problem(name, shape))]
        problems += [
            f"{name}: unexpected, the model has no such weight"
            for name in sorted(self.names() - asked_for)
            if not name.endswith(".rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
        ]
        self._refuse(problems)

    def check_tied_head(self) -> None:
        """Of an LM head that is there although config.json says that it is the embedding. Reads
        both, where `check` reads headers alone.

        Raises:
            CheckpointError: it has other values.
        """
        if "lm_head.weight" in self.names():
            self._refuse(self._head_problem())

    def _refuse(self, problems: Sequence[str]) -> None:
        if problems:
            raise CheckpointError(
                f"{self.path}: the tensors do not fit config.json:\n{listing(problems)}"
            )

    def _problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        if name == "lm_head.weight" and name not in self._file_of:
            return f"{name}: missing, and tie_word_embeddings is false"
        if name not in self._file_of:
            return f"{name}: missing"
        found = self.slice(name)
        if found.shape != shape:
            return f"{name}: shape {list(found.shape)}, expected {list(shape)}"
        if found.dtype not in _SAFETENSORS_DTYPES.values():
            return f"{name}: type {found.dtype} is not supported, {_instead_of(found.dtype)}"
        return None

    def _head_problem(self) -> list[str]:
        head, embedding = (self.slice(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        remedy = "remove it, or set tie_word_embeddings to false"
        why = "lm_head.weight: differs from the embedding, but tie_word_embeddings is true"
        if head.shape != embedding.shape or head.dtype not in _SAFETENSORS_DTYPES.values():
            return [f"{why}: {remedy}"]
        narrow = min((head, embedding), key=lambda t: t[:1].element_size())[:1].dtype
        rounds = False
        for first in range(0, embedding.shape[0], 4096):
            a, b = (t[first : first + 4096] for t in (head, embedding))
            if torch.equal(a.float(), b.float()):
                continue
            if head.dtype == embedding.dtype or not torch.equal(a.to(narrow), b.to(narrow)):
                return [f"{why}: {remedy}"]
            rounds = True
        types = f"by the rounding of {head.dtype} and {embedding.dtype} alone"
        return [f"{why} ({types}): {remedy}"] if rounds else []

    def _weight_map(self) -> dict[str, str]:
        path = self.path / INDEX
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text())["weight_map"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a safetensors index ({error}).") from None

    def _open(self, file: str) -> safe_open:
        if file not in self._open_files:
            self._open_files[file] = _open_safetensors(self.path / file)
        return self._open_files[file]


def weight_files(path: Path) -> list[str]:
    """Names of the files of weights in a directory, of formats that are read and that are not."""
    return sorted({file.name for pattern in _WEIGHTS for file in Path(path).glob(pattern)})


def _only_file(path: Path) -> str:
    """model.safetensors, where no index lists the files.

    Raises:
        CheckpointError: the weights are elsewhere, or in another format.
    """
    found = weight_files(path)
    if "model.safetensors" in found:
        return "model.safetensors"
    if (path / ".metadata").is_file():
        raise CheckpointError(
            f"{path}: is a Megatron checkpoint, where a Hugging Face directory belongs. Convert it "
            f"with tools/convert_hf.py to-hf."
        )
    if not found:
        raise CheckpointError(
            f"{path / 'model.safetensors'}: no such file. The checkpoint is incomplete."
        )
    if any(name.endswith(".safetensors") for name in found):
        raise CheckpointError(
            f"{path}: has {', '.join(found)}, and neither model.safetensors nor the {INDEX} that "
            f"lists the files of weights. Copy the directory again, all of it."
        )
    raise CheckpointError(
        f"{path}: has its weights in {', '.join(found)}, and only safetensors are read. Load them "
        f"with transformers' AutoModelForCausalLM.from_pretrained, and write them anew with "
        f"save_pretrained."
    )


def _instead_of(dtype: str) -> str:
    if dtype.startswith("F8"):
        return "being quantised: take the model that it was made of"
    return "only F32, BF16 and F16 are" if dtype == "F64" else "only floating point is"


def _open_safetensors(path: Path) -> safe_open:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. The checkpoint is incomplete.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: it cannot be mapped
        raise CheckpointError(
            f"{path}: cannot be read ({error}). The file is damaged or truncated "
            f"({path.stat().st_size} bytes): copy it again."
        ) from None


def fingerprint(files: Iterable[Path]) -> list:
    """Name, size and time of change, in ns, of each."""
    stats = [(str(path.resolve()), path.stat()) for path in sorted(files)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def copy_side_files(source: Path, target: Path) -> None:
    """config.json, generation_config.json, tokenizer, chat template: all but the weights."""
    for path in Path(source).iterdir():
        is_side_file = path.suffix in _SIDE_SUFFIXES or path.name in ("LICENSE", "NOTICE")
        if path.is_file() and is_side_file and path.name not in _ABOUT_WEIGHTS:
            shutil.copyfile(path, target / path.name)


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file before it exists."""

    name: str
    specs: tuple[TensorSpec, ...]
    """In the order in which their bytes follow each other."""

    @property
    def header(self) -> bytes:
        """As the format has it: 8 bytes of length, then JSON, padded to 8 bytes with spaces
        (https://huggingface.co/docs/safetensors)."""
        entries: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in self.specs:
            start, end = end, end + spec.num_bytes
            entries[spec.name] = {
                "dtype": _SAFETENSORS_DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(spec.num_bytes for spec in self.specs)


def plan_files(
    groups: Iterable[Sequence[TensorSpec]], max_file_bytes: int
) -> list[tuple[TensorSpec, ...]]:
    """Consecutive groups, filled up to a size; a group is never cut, however large."""
    files: list[list[TensorSpec]] = []
    size = 0
    for group in groups:
        num_bytes = sum(spec.num_bytes for spec in group)
        if not files or size + num_bytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1] += group
        size += num_bytes
    return [tuple(specs) for specs in files]


def name_files(files: Sequence[tuple[TensorSpec, ...]]) -> list[PlannedFile]:
    """With transformers' names."""
    count = len(files)
    if count == 1:
        return [PlannedFile("model.safetensors", files[0])]
    return [
        PlannedFile(f"model-{number:05d}-of-{count:05d}.safetensors", specs)
        for number, specs in enumerate(files, start=1)
    ]


class SafetensorsWriter:
    """Writes a planned file front to back; it bears its name only when it is complete."""

    def __init__(self, directory: Path, planned: PlannedFile) -> None:
        self._planned = planned
        self._target = directory / planned.name
        self._partial = directory / f"{planned.name}.partial"
        self._next = 0

    def __enter__(self) -> "SafetensorsWriter":
        self._file = self._partial.open("wb")
        self._file.write(self._planned.header)
        return self

    def write(self, tensor: torch.Tensor) -> None:
        """The next tensor of the plan, cast to its type."""
        spec = self._planned.specs[self._next]
        assert tuple(tensor.shape) == spec.shape, (
            f"{spec} is next in {self._planned.name}, not a shape of {list(tensor.shape)}"
        )
        self._next += 1
        # Row by row of the outer dim: a cast or a copy to the host never holds the whole again.
        for rows in tensor.detach().split(max(_WRITE_ELEMENTS // tensor[:1].numel(), 1)):
            flat = rows.to("cpu", spec.torch_dtype).contiguous().view(-1)
            self._file.write(flat.view(torch.uint8).numpy())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None:
            assert self._next == len(self._planned.specs), f"{self._target}: tensors are missing"
            self._partial.rename(self._target)


def write_index_and_config(directory: Path, files: Sequence[PlannedFile]) -> None:
    """What transformers looks for beside the weights: where each tensor is, and config.json's
    dtype."""
    config = json.loads((directory / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = files[0].specs[0].dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(files) == 1:
        return
    index = {
        "metadata": {"total_size": sum(s.num_bytes for file in files for s in file.specs)},
        "weight_map": {s.name: file.name for file in files for s in file.specs},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def listing(problems: Sequence[str]) -> str:
    """All of them, a line each; those that differ in layer or expert only share a line."""
    number = re.compile(r"(?<=layers\.|xperts\.)\d+")
    rows_of: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for problem in problems:
        rows_of[number.sub("\0", problem)].append(tuple(map(int, number.findall(problem))))
    return "\n".join(
        f"  {line}" for pattern, rows in rows_of.items() for line in _shared_lines(pattern, rows)
    )


def _shared_lines(pattern: str, rows: Sequence[tuple[int, ...]]) -> Iterator[str]:
    """The pattern with numbers in its gaps: one line for all that have the same rest of the row."""
    if not rows[0]:
        yield pattern
        return
    rests: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for first, *rest in rows:
        rests[first].add(tuple(rest))
    sharing: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
    for first in sorted(rests):
        sharing[tuple(sorted(rests[first]))].append(first)
    for rest, numbers in sharing.items():
        yield from _shared_lines(pattern.replace("\0", _ranges(numbers), 1), rest)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "{0-2,5}", and a single number as it is."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else "{" + text + "}"
