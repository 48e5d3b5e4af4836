"""Build TransformerEngine for the torch and the Megatron-Core that are installed. Out: installed,
or one line that says why not, which is no error: the run then takes the local layer specification.

TransformerEngine's binding to PyTorch comes as source alone. pip would build it in isolation, for
whatever torch is newest; the result cannot be loaded by another one. So it is built here, with the
torch that is there, in the range of versions that Megatron-Core's own metadata names.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from megatron_eopd.doctoring.ranges import TRANSFORMER_ENGINE, transformer_engine_range

# What its build imports; without isolation nobody else brings them.
BUILD_TOOLS = ("wheel", "ninja", "packaging", "pybind11")
CUDA_MAJORS = ("12", "13")
LOCAL = "The run takes the local layer specification (model.transformer_impl=local)."


def find_nvcc() -> Path | None:
    """CUDA's compiler: of CUDA_HOME, of PATH, or where its packages put it."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [Path(home, "bin", "nvcc") for home in homes if home]
    on_path = shutil.which("nvcc")
    return next((p for p in [*places[:1], Path(on_path or "-"), *places[1:]] if p.is_file()), None)


def header_folders() -> list[Path]:
    """Of cuDNN and NCCL as torch has brought them: no second version of either is compiled in."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    return [f for root in roots for n in ("cudnn", "nccl") if (f := root / n / "include").is_dir()]


def obstacle(torch_cuda: str | None, nvcc: Path | None) -> str | None:
    """Why it cannot be built here. `torch_cuda`: torch.version.cuda."""
    if torch_cuda is None:
        return "torch is a CPU build"
    if torch_cuda.partition(".")[0] not in CUDA_MAJORS:
        return f"torch is built for CUDA {torch_cuda}, and TransformerEngine comes for 12 and 13"
    if nvcc is None:
        return "there is no nvcc (CUDA_HOME, PATH, /usr/local/cuda): a CUDA toolkit compiles it"
    release = nvcc_release(nvcc)
    if release.partition(".")[0] != torch_cuda.partition(".")[0]:
        return f"{nvcc} is of CUDA {release or 'unknown'}, and torch is built for {torch_cuda}"
    return None


def nvcc_release(nvcc: Path) -> str:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", told)
    return found[1] if found else ""


def commands(torch_version: str, torch_cuda: str, range_: str) -> list[list[str]]:
    pip = [sys.executable, "-m", "pip", "install"]
    extras = f"pytorch,core_cu{torch_cuda.partition('.')[0]}"
    # The same torch again: a build against it is of no use if pip then takes another.
    target = [f"{TRANSFORMER_ENGINE}[{extras}]{range_}", f"torch=={torch_version}"]
    return [[*pip, *BUILD_TOOLS], [*pip, "--no-build-isolation", *target]]


def build_environment(nvcc: Path) -> dict[str, str]:
    folders = [*map(str, header_folders()), *filter(None, [os.environ.get("CPATH")])]
    return {"CUDA_HOME": str(nvcc.parents[1]), "CPATH": os.pathsep.join(folders)}


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    examples = "example:\n  .venv/bin/python tools/install_transformer_engine.py --dry-run"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, epilog=examples)
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    arguments = parser.parse_args()
    try:
        import torch

        range_ = transformer_engine_range(requires("megatron-core") or [])
    except (ImportError, PackageNotFoundError) as error:
        print(f"error: {error}. Install torch and megatron-core first (make install).")
        return 1
    nvcc = find_nvcc()
    reason = obstacle(torch.version.cuda, nvcc)
    if reason is not None:
        print(f"TransformerEngine is not installed: {reason}. {LOCAL}")
        return 0
    environment = build_environment(nvcc)
    # The version that pip knows: torch.__version__ has a CUDA suffix that the index does not.
    for command in commands(version("torch"), torch.version.cuda, range_):
        settings = [f"{name}={value}" for name, value in environment.items()]
        print(shlex.join(["env", *settings, *command]), flush=True)
        if arguments.dry_run:
            continue
        if subprocess.run(command, env=os.environ | environment, check=False).returncode:
            print(
                f"error: TransformerEngine could not be installed, see above. {LOCAL} To go on "
                f"without: make install TRANSFORMER_ENGINE=no."
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
