"""Whether a start kept its promises, and a run its result. Knows nothing of how faults are made.

In: what the run left on disk before a start, and what the start said. Out: problems in words; none
means that all is as it should be.
"""

import io
import re
import runpy
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from megatron_eopd.checkpoints import files
from tests.chaos.start import ROOT, Start

TORCHRUNS_OWN = ("torch.distributed.elastic",)
"""Where errors come from with which torchrun itself ends, traceback and all."""

problems_of_checkpoint = runpy.run_path(str(ROOT / "tools/checkpoints.py"))["problems_of"]
compare_runs = runpy.run_path(str(ROOT / "tools/compare_runs.py"))["main"]


@dataclass
class Checkpoints:
    """Those of a run that are complete, before a start."""

    sound: list[Path] = field(default_factory=list)
    """The newest last."""
    damaged: list[Path] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    """Damage that nobody has done."""

    @property
    def newest(self) -> Path | None:
        return self.sound[-1] if self.sound else None

    @property
    def to_tell(self) -> list[Path]:
        """Damaged ones that would have been gone on from."""
        newest = files.place_of(self.newest) if self.newest else (-1, 0)
        return [path for path in self.damaged if files.place_of(path) > newest]


def look(run_dir: Path, damaged: set[Path]) -> Checkpoints:
    """`damaged`: on purpose."""
    found = Checkpoints()
    for path in files.complete(run_dir):
        if path in damaged:
            found.damaged.append(path)
            continue
        problems = problems_of_checkpoint(path, True)
        found.unexpected += [f"{path.name}: {problem}" for problem in problems]
        (found.damaged if problems else found.sound).append(path)
    return found


def judge_start(start: Start, before: Checkpoints, damaged: set[Path]) -> Iterator[str]:
    """After its end. `damaged`: on purpose, and still."""
    yield from before.unexpected
    log = start.log()
    begun = re.findall(r"starts: at iteration (\d+)", log)
    loaded = [Path(path) for path in re.findall(r"resumed from (\S+)", log)]
    if begun and begun[0] == "0" and before.newest:
        yield f"began anew beside {before.newest.name}"
    own = loaded[:1] if before.newest or not begun else []
    if own and own[0] != before.newest:
        newest = before.newest.name if before.newest else "none"
        yield f"loaded {own[0].name}; the newest sound one is {newest}"
    for path in loaded[len(own) :]:  # torchrun's restarts: of what has been written since
        if path in damaged and not start.has_written(path):
            yield f"loaded {path.name}, which is damaged"
    if loaded:
        said = log + start.output()
        for path in before.to_tell:
            if not re.search(rf"(?i)^.*warning.*{re.escape(str(path))}", said, re.MULTILINE):
                yield f"went past {path.name} without a word"
    yield from (f"traceback: {line}" for line in tracebacks(start.output()))


def warnings_of(start: Start) -> str:
    """What the start said of a checkpoint that it went past."""
    found = re.findall(r"(?i)warning: (.*Going on from.*)", start.log() + start.output())
    return found[0] if found else ""


def tracebacks(output: str) -> list[str]:
    """The last line of each, but for those with which torchrun itself ends."""
    blocks = re.findall(
        r"Traceback \(most recent call last\):\n(?:.*\n)*?(?:\[\w+\]: ?)?([\w.]+(?:Error|Exception|"
        r"Interrupt|Exit)\b.*)",
        output,
    )
    return [line for line in blocks if not line.startswith(TORCHRUNS_OWN)]


def judge_result(run_dir: Path, undisturbed: Path) -> list[str]:
    """Whether the finished run is the one that it would have been."""
    said = io.StringIO()
    with redirect_stdout(said):
        code = compare_runs([str(undisturbed), str(run_dir), "--assert-equal"])
    lines = [line.strip() for line in said.getvalue().splitlines()]
    return [line for line in lines if line and not line.startswith("option ")] if code else []
