"""How much memory a process of this host may still take. Linux's own books, and no more."""

from collections.abc import Iterator
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """What the host has free or can free, and no more than a container or a job may still take.
    `root`: where /proc and /sys are."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return min(int(available) * 1024, *_left_of_limits(root / "sys/fs/cgroup", root), 2**63)


def _left_of_limits(groups: Path, root: Path) -> Iterator[int]:
    """Of the control groups (version 2) that this process is in, innermost first."""
    lines = (root / "proc/self/cgroup").read_text().splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "")
    folder = groups / own.strip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(groups):
            return
        try:
            limit = (place / "memory.max").read_text().strip()
            used = int((place / "memory.current").read_text())
            stat = (place / "memory.stat").read_text().splitlines()
        except OSError:  # a group that does not count memory, or is not to be seen from here
            continue
        if limit != "max":
            counts = dict(line.split() for line in stat)
            # Pages of files that nobody has read for a while go first, and cost nothing.
            yield max(int(limit) - used + int(counts.get("inactive_file", 0)), 0)
