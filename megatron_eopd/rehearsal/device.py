"""Which tensors a GPU would hold, and who asks it for a value. In: calls of PyTorch's functions.

A value that the host waits for stops the queue of kernels. Here there is none, so it is counted by
where it was asked for, and answered: see answers.py.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes

from megatron_eopd.rehearsal.answers import answer
from megatron_eopd.rehearsal.watch import Watch, place_of_caller

Tensor = torch.Tensor
_IS_CUDA = Tensor.is_cuda.__get__
_READS: dict[Callable, Callable[[Any], Any]] = {
    Tensor.item: lambda value: value,
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__float__: float,
    Tensor.__index__: int,
}
"""What turns a tensor of one element into a Python number, and an answer, too."""


class FakeDevice(TorchFunctionMode):
    """On top of the emulation of CUDA, below whatever names a device for a block."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self._constructors = _device_constructors()
        # As the emulation answers: no other tensor is made on this very object.
        self._current = torch.device("cpu")
        torch.cuda.current_device = lambda: self._current

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Where there is no GPU PyTorch has no page-locked memory, and here there is no memory.
        kwargs.pop("pin_memory", None)
        if func is Tensor.pin_memory:
            return args[0]
        if func == _IS_CUDA:
            return not self._watch.is_on_host(args[0])
        if func in self._constructors:
            return self._call(func, args, kwargs, on_host=not self._is_gpu(kwargs.get("device")))
        if func in _READS:
            return self._read(func, args[0])
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.numpy):
            return self._move(func, args, kwargs)
        tensors = [x for x in args if isinstance(x, Tensor)]
        # Computed where its arguments are.
        on_host = bool(tensors) and all(map(self._watch.is_on_host, tensors))
        return self._call(func, args, kwargs, on_host=on_host)

    def _call(self, func: Callable, args: tuple, kwargs: dict, *, on_host: bool) -> Any:
        with self._watch.on_host_meanwhile() if on_host else nullcontext():
            return func(*args, **kwargs)

    def tolist(self, tensor: Tensor) -> Any:
        """One copy, where a fake tensor's own method asks for each element."""
        return _filled(list(tensor.shape), self._read(Tensor.item, tensor))

    def _read(self, func: Callable, tensor: Tensor) -> Any:
        value = answer(tensor, place_of_caller())
        if not self._watch.is_on_host(tensor):
            self._watch.read()
        elif (constant := getattr(tensor, "constant", None)) is not None and constant.numel() == 1:
            with _disable_current_modes():  # what the tensor was made of, while PyTorch knows it
                return func(constant)
        return _READS[func](value)

    def _move(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        tensor, places = args[0], [*args[1:], *kwargs.values()]
        is_host = self._watch.is_on_host(tensor)
        to_gpu = func is Tensor.cuda or any(self._is_gpu(place) for place in places)
        to_host = func in (Tensor.cpu, Tensor.numpy) or any(map(_is_cpu, places))
        if to_host and not to_gpu and not is_host:
            # A copy that nobody waits for is told by its name; its reader will be counted.
            if not kwargs.get("non_blocking"):
                self._watch.read()
            return self._call(torch.empty_like, (tensor,), {}, on_host=True)
        moved = func(*args, **kwargs)
        return moved.clone() if to_gpu and is_host and moved is tensor else moved

    def _is_gpu(self, place: Any) -> bool:
        if place is self._current:
            return True
        if isinstance(place, int) and not isinstance(place, bool):
            return True
        return isinstance(place, str | torch.device) and str(place).startswith("cuda")


def _is_cpu(place: Any) -> bool:
    return isinstance(place, str | torch.device) and str(place) == "cpu"


def _filled(shape: list[int], value: Any) -> Any:
    return value if not shape else [_filled(shape[1:], value) for _ in range(shape[0])]
