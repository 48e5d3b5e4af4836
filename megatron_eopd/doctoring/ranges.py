"""Which versions fit together, from the packages' own metadata."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

TRANSFORMER_ENGINE = "transformer-engine"


def transformer_engine_range(requirements: Sequence[str]) -> str:
    """Of TransformerEngine, as Megatron-Core's metadata names it under one of its extras; empty if
    it takes any."""
    wanted = (Requirement(line) for line in requirements)
    ranges = {str(r.specifier) for r in wanted if _plain(r.name) == TRANSFORMER_ENGINE}
    if len(ranges) > 1:
        raise ValueError(f"megatron-core names several ranges: {sorted(ranges)}")
    return ranges.pop() if ranges else ""


def is_within(found: str, range_: str) -> bool:
    return SpecifierSet(range_).contains(found, prereleases=True)


def unmet(package: str) -> list[str]:
    """What this package needs, and has not, or not in its range; extras do not count."""
    lines = []
    for requirement in map(Requirement, requires(package) or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            lines.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            lines.append(f"{requirement.name} {found} is not {requirement.specifier}")
    return lines


def _plain(name: str) -> str:
    return name.replace("_", "-").lower()
