"""Tiny random models, made once per test run."""

from pathlib import Path

import pytest


def make_model(*arguments, **options) -> Path:
    """Imported when it is called: the tests of the loss run where transformers is not installed."""
    from tests import tiny_models

    return tiny_models.make_model(*arguments, **options)


@pytest.fixture(scope="session")
def qwen3_dir(tmp_path_factory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def tied_qwen3_dir(tmp_path_factory) -> Path:
    return make_model("qwen3_tied", tmp_path_factory.mktemp("qwen3_tied"), seed=1)


@pytest.fixture(scope="session")
def family_dirs(tmp_path_factory) -> dict[str, Path]:
    """One directory of every family."""
    from tests.tiny_models import FAMILIES

    path = tmp_path_factory.mktemp("families")
    return {family: make_model(family, path / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    """Another width and depth than the student's; surer of itself, so that the gate has something
    to tell apart: entropies from 0.7 to 4 nats."""
    path = tmp_path_factory.mktemp("teacher")
    return make_model(
        "qwen3", path, seed=5, hidden_size=96, num_hidden_layers=2, initializer_range=0.2
    )
