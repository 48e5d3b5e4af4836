"""Megatron-Core on CPU: the CUDA surface that it hard-codes, answered by the CPU.

Megatron-Core 0.16 writes `device="cuda"` into its schedules and asks `torch.cuda` for devices,
streams and RNG states. `emulate_cuda()` maps those calls to the CPU, once per process, and refuses
to run where a real GPU is present. Nothing else in this package knows that it is needed.

What is emulated, and why each is safe on CPU:
  device arguments   "cuda", "cuda:0" and integers become "cpu"
  Tensor.cuda()      returns the tensor itself
  Tensor.type()      answers torch.cuda.*: Megatron's optimizers compare this string
  torch.cuda.*       one device, streams and events that do nothing (CPU work is synchronous)
  RNG                torch.cuda's generator is torch's default generator
  expert dispatch    split sizes become numpy arrays, as they do on their way from a GPU
"""

import contextlib
import warnings
from collections import defaultdict
from importlib.metadata import version
from typing import Any

import torch
from megatron.core.transformer.moe import token_dispatcher
from packaging.version import Version
from torch.overrides import TorchFunctionMode

RAN_ON = ("0.16", "0.20")
"""Megatron-Core versions [from, below) that the emulation was run on."""


def emulate_cuda() -> None:
    """Make Megatron-Core run in this process without a GPU. Calling it again does nothing.

    Raises:
        RuntimeError: a GPU is present, or Megatron-Core is a version that was never tried.
    """
    if isinstance(torch.cuda.Stream, type) and issubclass(torch.cuda.Stream, _Stream):
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "a GPU is present: Megatron-Core needs no emulation, and must not get one"
        )
    megatron_version = version("megatron-core")
    if not Version(RAN_ON[0]) <= Version(megatron_version) < Version(RAN_ON[1]):
        raise RuntimeError(
            f"megatron-core {megatron_version} was never run on CPU here, only "
            f"{RAN_ON[0]} ≤ version < {RAN_ON[1]}. Install one of those."
        )
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    _CpuForCuda().__enter__()
    _replace_torch_cuda()
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes_as_numpy
    # Some of Megatron-Core's functions are compiled; torch.compile does not know this torch.cuda,
    # and would need a C++ compiler for what is a few small operations.
    torch.compiler.set_stance("force_eager")


class _CpuForCuda(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], *(_on_cpu(a) for a in args[1:]))
        return func(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    is_index = isinstance(device, int) and not isinstance(device, bool)
    is_name = isinstance(device, str) and device.startswith("cuda")
    is_cuda = isinstance(device, torch.device) and device.type == "cuda"
    return torch.device("cpu") if is_index or is_name or is_cuda else device


class _Stream:
    """A stream or an event. CPU work is done when the call returns, so there is nothing to do."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def record_event(self, *_: Any) -> "_Stream":
        return self

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...


def _split_sizes_as_numpy(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    """Megatron-Core makes the split sizes of an all-to-all numpy arrays when it brings them from
    the GPU; a tensor that was on the CPU all along stays one, which all-to-all refuses."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _nothing(*_: Any, **__: Any) -> None: ...


def _replace_torch_cuda() -> None:
    cuda = torch.cuda
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    # The device itself, not an index: inside a backward pass no TorchFunctionMode is active, so the
    # tensors that Megatron's backward functions allocate must come out right without it.
    cuda.current_device = lambda: torch.device("cpu")
    cuda.device_count = lambda: 1
    cuda.is_initialized = lambda: True
    cuda.synchronize = cuda.set_device = cuda.empty_cache = _nothing
    cuda._lazy_call = lambda call, **_: call()
    cuda.default_generators = defaultdict(lambda: torch.default_generator)
    cuda.initial_seed = torch.initial_seed
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
