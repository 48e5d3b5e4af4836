"""Which teachers of a run agreed before. RUN_DIR/teacher_check.json, by section."""

import hashlib
import json
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_eopd.config import Config
from megatron_eopd.models.hf_files import weight_files
from megatron_eopd.models.megatron_config import uses_transformer_engine
from megatron_eopd.teacher.model import Swaps

FILE = "teacher_check.json"
LIBRARIES = ("torch", "megatron-core", "transformers")


def identity(section: str, config: Config, swaps: Swaps, device: str) -> dict[str, Any]:
    """What the comparison's outcome depends on, but for layouts: with another one it is made again.
    Files count by name, size and time, and config.json by its content. `device`: `cuda` or `cpu`,
    whose kernels compute here."""
    teacher = config.all_teachers[section]
    path = teacher.hf_path.resolve()
    stats = [(name, (path / name).stat()) for name in weight_files(path)]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    digest = hashlib.sha256(json.dumps(files).encode() + (path / "config.json").read_bytes())
    has_te = uses_transformer_engine(config.model)
    libraries = (*LIBRARIES, "transformer-engine") if has_te else LIBRARIES
    return {
        "path": str(path),
        "files": digest.hexdigest(),
        "dtype": config.dtype_of(teacher),
        "payload": teacher.payload,
        "temperature": config.teacher_temperature,
        "swaps": [list(pair) for pair in swaps],
        "device": device,
        "layers": "transformer_engine" if has_te else "local",
        "versions": {name: version(name) for name in libraries},
    }


def read(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Section → identity; none where there is no file, or one that a full disk cut short."""
    try:
        found = json.loads((run_dir / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(run_dir: Path, identities: dict[str, dict[str, Any]]) -> None:
    path = run_dir / FILE
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(identities, indent=2) + "\n")
    unfinished.replace(path)


def forget(run_dir: Path, sections: Collection[str]) -> None:
    """Until they agree again, however the comparison ends."""
    before = read(run_dir)
    kept = {section: known for section, known in before.items() if section not in sections}
    if kept != before:
        write(run_dir, kept)
