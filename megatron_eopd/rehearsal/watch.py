"""What one rank allocates, computes, sends and asks for. In: every operation. Out: Tally.

A TorchDispatchMode sees each operation behind autograd, those of the backward pass too. Memory is
counted by storages, from the operation that makes one until nobody holds it any more; what kernels
use within an operation is not seen.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from megatron_eopd.rehearsal.answers import answer

_SCALAR = torch.ops.aten._local_scalar_dense.default
HOST_PLACES = ("megatron_eopd/host_memory.py",)
"""Files whose tensors lie in host memory, whatever they are made on here."""


class Block(NamedTuple):
    """A piece of memory."""

    size: int
    """Bytes."""
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: str
    """Where it was made."""
    number: int
    """Of the allocations, in their order."""


class Collective(NamedTuple):
    name: str
    group: str
    """As Megatron-Core describes it."""
    ranks: int


@dataclass
class Tally:
    """Of one stretch of a rehearsal."""

    blocks: list[Block] = field(default_factory=list)
    """All memory at its peak, the largest first."""
    flops: int = 0
    """Of matrix products and attention, as PyTorch counts them."""
    collectives: Counter[Collective] = field(default_factory=Counter)
    bytes_moved: Counter[Collective] = field(default_factory=Counter)
    """Of the larger side of each."""
    reads: Counter[str] = field(default_factory=Counter)
    """By place: how often the device was asked for a value."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(block.size for block in self.blocks)

    @property
    def kinds(self) -> Counter[str]:
        """Bytes of each kind at the peak."""
        kinds: Counter[str] = Counter()
        for block in self.blocks:
            kinds[block.kind] += block.size
        return kinds


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tallies: dict[str, Tally] = {}
        """By stretch."""
        self._tally = Tally()
        self._kind, self._is_host = "other", False
        self._host: dict[int, weakref.ref] = {}
        self._live: dict[int, tuple[weakref.ref, Block]] = {}
        self._freed: list[Block] = []  # since the peak
        self._now = self._peak = self._count = self._count_at_peak = 0

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """What is allocated meanwhile is of this kind."""
        outer, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = outer

    @contextmanager
    def on_host_meanwhile(self) -> Iterator[None]:
        """What is allocated meanwhile lies in host memory."""
        outer, self._is_host = self._is_host, True
        try:
            yield
        finally:
            self._is_host = outer

    def enter(self, stretch: str) -> None:
        """What happens from now on belongs to this stretch; one that comes again goes on."""
        self._close()
        self._tally = self.tallies.setdefault(stretch, Tally())
        self._note_peak()

    def _close(self) -> None:
        """Where memory was higher than in the stretch before, that is its peak."""
        if self._peak > self._tally.peak:
            there = [*self._freed, *(block for _, block in self._live.values())]
            at_peak = [block for block in there if block.number <= self._count_at_peak]
            self._tally.blocks = sorted(at_peak, key=lambda block: -block.size)

    def rename(self, tensors: Any, kind: str) -> None:
        """The memory of these tensors is of this kind."""
        for tensor in tree_leaves(tensors):
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                reference, block = self._live[key]
                self._live[key] = reference, block._replace(kind=kind)

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        is_real = not isinstance(tensor, FakeTensor)
        return is_real or tensor.untyped_storage()._cdata in self._host

    def read(self) -> None:
        """The device was asked for a value, by whom is on the stack."""
        self._tally.reads[place_of_caller()] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SCALAR and isinstance(args[0], FakeTensor):  # from C++, or in a backward pass
            if not self.is_on_host(args[0]):
                self.read()
            return answer(args[0], place_of_caller())
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            # PyTorch's formulas do not know the overloads of a product with a dtype of its own.
            shapes = [x for x in args if not isinstance(x, torch.dtype)]
            named = {name: x for name, x in kwargs.items() if name not in ("out", "out_dtype")}
            self._tally.flops += formula(*shapes, **named, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return out

    def _communicate(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Count it, and let PyTorch do it with tensors of nothing: the fake group would not look
        at them, but fake tensors cannot go through all of these operations."""
        tensors = [
            sum(t.nbytes for t in tree_leaves(x) if isinstance(t, torch.Tensor)) for x in args
        ]
        group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
        what = Collective(func.overloadpacket.__name__.strip("_"), group.group_desc, group.size())
        self._tally.collectives[what] += 1
        self._tally.bytes_moved[what] += max(tensors)
        with _disable_current_modes():
            nothing = torch.empty(0)
            args, kwargs = tree_map(
                lambda x: nothing if isinstance(x, torch.Tensor) else x, (args, kwargs)
            )
            return func(*args, **kwargs)

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or key in self._host or not size:
            return
        place = place_of_caller()
        if self._is_host or place.startswith(HOST_PLACES):
            self._host[key] = weakref.ref(storage, lambda _: self._host.pop(key, None))
            return
        self._count += 1
        shape = tuple(tensor.shape)
        block = Block(size, self._kind, shape, tensor.dtype, place, self._count)
        self._live[key] = weakref.ref(storage, lambda _: self._forget(key)), block
        self._now += size
        if self._now > self._peak:
            self._note_peak()

    def _forget(self, key: int) -> None:
        if key in self._live:
            _, block = self._live.pop(key)
            self._now -= block.size
            self._freed.append(block)

    def _note_peak(self) -> None:
        self._peak, self._count_at_peak = self._now, self._count
        self._freed.clear()


def place_of_caller() -> str:
    """Of the innermost frame that is not PyTorch's or this package's: `file:function`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for package in ("megatron_eopd/", "megatron/"):
            start = name.rfind("/" + package)
            if start >= 0 and "/rehearsal/" not in name and "parallel/cpu.py" not in name:
                return f"{name[start + 1 :]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
