"""The CUDA environment, which no test can install: its packages, and the steps that bring them."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_eopd.doctoring.ranges import transformer_engine_range

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "examples/cluster"
RESOLVE_S = 150

spec = importlib.util.spec_from_file_location(
    "install_transformer_engine", ROOT / "tools/install_transformer_engine.py"
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def described() -> dict:
    """What setup.py says, without a build."""
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def requirements() -> list[str]:
    told = described()
    return [*told["install_requires"], *told["extras_require"]["cuda"]]


def made(*arguments: str) -> list[str]:
    """The commands of `make`, not run."""
    output = subprocess.run(
        ["make", "-n", "-B", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return output.stdout.splitlines()


# --- what is asked for ---------------------------------------------------------------------------


def test_nothing_of_the_cuda_extra_is_compiled_by_pip():
    """TransformerEngine has a step of its own, and PyPI's apex is another project."""
    everything = " ".join([*requirements(), *described()["extras_require"]["dev"]]).lower()
    assert "vllm" in everything
    for name in ("transformer", "apex", "flash-attn"):
        assert not re.search(rf"\b{name}[-_]?(engine)?\b(?!s)", everything), name


@pytest.mark.slow
def test_the_cuda_packages_resolve_from_wheels_alone(tmp_path):
    """With the torch that the Makefile pins, and every version within setup.py's range."""
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    found = resolve([torch, *requirements()], tmp_path)
    assert found["torch"] == Version(torch.partition("==")[2])
    for line in requirements():
        requirement = Requirement(line)
        version = found[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{line}: {version}"
    assert not {"apex", "transformer-engine"} & found.keys()
    assert {"nvidia-nccl-cu13", "triton"} <= found.keys(), "not torch's CUDA build"


def resolve(wanted: list[str], folder: Path) -> dict[str, Version]:
    """Versions by name, as pip would install them into an empty environment."""
    report, newer_pip = folder / "report.json", folder / "pip"
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    # Python 3.11 brings pip 23, whose dry run downloads every wheel, gigabytes of them.
    fetch = [*install, "--no-deps", "--target", str(newer_pip), "pip>=25"]
    if subprocess.run(fetch, env=environment_of_pip(), capture_output=True).returncode:
        pytest.skip("no package index can be reached")
    options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--no-input"]
    result = subprocess.run(
        [*install, *options, "--report", str(report), "--target", str(folder / "none"), *wanted],
        env=environment_of_pip() | {"PYTHONPATH": str(newer_pip)},
        capture_output=True,
        text=True,
        timeout=RESOLVE_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    installs = json.loads(report.read_text())["install"]
    assert all(item["download_info"]["url"].endswith(".whl") for item in installs)
    return {
        item["metadata"]["name"].lower().replace("_", "-"): Version(
            Version(item["metadata"]["version"]).public
        )
        for item in installs
    }


def environment_of_pip() -> dict[str, str]:
    """Without its configuration: that of a machine without a GPU may name wheels for the CPU."""
    return os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_RETRIES": "1"}


# --- TransformerEngine's step --------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines,range_",
    [
        (['transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"'], "<2.12.0"),
        (['transformer-engine[core_cu13,pytorch]; extra == "te"', "torch"], ""),
        (["torch>=2.6.0"], ""),
    ],
    ids=["0.16", "0.19", "none"],
)
def test_the_range_is_the_one_that_megatron_core_names(lines, range_):
    """Under whichever extra: it has moved from dev to te."""
    assert range_ in transformer_engine_range(lines) and bool(range_) == bool(
        transformer_engine_range(lines)
    )


@pytest.mark.parametrize("cuda,core", [("13.0", "core_cu13"), ("12.9", "core_cu12")])
def test_it_is_built_for_the_installed_torch(cuda, core):
    """Without isolation, with the core package of torch's CUDA, and the same torch named again."""
    *_, build = tool.commands("2.13.0", cuda, "<2.12.0,>=2.9")
    wanted = f"transformer-engine[pytorch,{core}]<2.12.0,>=2.9"
    assert build[-3:] == ["--no-build-isolation", wanted, "torch==2.13.0"]


def test_what_it_misses_is_told(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.1'\n")
    nvcc.chmod(0o755)
    assert tool.obstacle(None, nvcc) == "torch is a CPU build"
    assert "there is no nvcc" in tool.obstacle("13.0", None)
    assert "is of CUDA 12.4, and torch is built for 13.0" in tool.obstacle("13.0", nvcc)
    assert tool.obstacle("12.6", nvcc) is None


def test_a_cpu_build_of_torch_is_one_line_and_no_error(capsys, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr(sys, "argv", ["install_transformer_engine.py"])
    assert tool.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        "TransformerEngine is not installed: torch is a CPU build. The run takes the local layer "
        "specification (model.transformer_impl=local)."
    ]


# --- the same steps everywhere -------------------------------------------------------------------


def test_make_installs_torch_then_vllm_then_transformer_engine():
    lines = made("install", "HAS_GPU=yes", "VENV=/nowhere/venv", "PYTHON=true")
    order = [" install torch==", '".[cuda,dev]" torch==', "tools/install_transformer_engine.py"]
    places = [next(n for n, line in enumerate(lines) if part in line) for part in order]
    assert places == sorted(places)
    without = made("install", "HAS_GPU=yes", "VENV=/nowhere/venv", "TRANSFORMER_ENGINE=no")
    assert not any(order[2] in line for line in without)


def test_both_images_are_made_by_the_same_commands():
    """Packages of the system, make install as on a GPU, and make doctor; on one base image."""
    docker, apptainer = ((CLUSTER / name).read_text() for name in ("Dockerfile", "eopd.def"))
    commands = re.findall(r"^RUN (.+)$", docker, re.MULTILINE)
    post = apptainer.partition("%post")[2].partition("%environment")[0]
    lines = [line.strip() for line in post.splitlines() if line.strip()]
    own = ("export", "cd", "#", "rm")
    assert commands == [line for line in lines if line.split()[0] not in own]
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert {".venv*", "runs"} <= set(ignored) and "rm -rf .venv* runs" in lines
    assert "make install HAS_GPU=yes PYTHON=python3.11" in commands
    assert re.search(r"^ARG BASE=(\S+)", docker, re.M)[1] == re.search(r"From: (\S+)", apptainer)[1]
    settings = re.search(r"^ENV (NVTE.+)$", docker, re.MULTILINE)[1]
    assert f"export {settings}" in lines
    for text in (docker, apptainer):
        assert "NOT BUILT HERE" in text
