"""Real data for checks: in EOPD_TEST_DATA, by default shared/data beside the repository."""

import os
from pathlib import Path

import pytest

REAL_DATA = Path(os.environ.get("EOPD_TEST_DATA", Path(__file__).parents[2] / "shared/data"))


def real_data(name: str) -> Path:
    """A file or directory of it; skips the test where that is absent."""
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent; EOPD_TEST_DATA names the directory that has {name}")
    return path
