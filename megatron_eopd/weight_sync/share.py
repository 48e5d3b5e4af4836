"""Memory that one process fills and others on its host read: where a bucket lies, once.

A `Share` is a few slots of equal size. Its handle is plain data, from which a reader opens the
same memory. Nothing of it has a name that another could guess or that could be left behind:

- on a CPU it is a memfd (memfd_create(2)), which readers open as /proc/PID/fd/N. Linux lets only
  processes of the same user do that, and frees the memory with the last one that has it open;
- on a GPU it is an allocation that readers open by its CUDA IPC handle, on the same device, which
  is told by its UUID because it may have another number there.

No vLLM is imported here, so that trainer ranks never load it.
"""

import mmap
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from megatron_eopd.errors import ConfigError

Handle = dict[str, Any]
"""Strings and numbers, as JSON has them."""


class Slots:
    """What writer and readers have in common."""

    def __init__(self, memory: torch.Tensor, slot_bytes: int, num_slots: int) -> None:
        """`memory`: uint8, of all slots."""
        self._memory = memory
        self.slot_bytes, self.num_slots = slot_bytes, num_slots

    def slot(self, number: int) -> torch.Tensor:
        """uint8, `slot_bytes` long: slot `number` modulo their count."""
        start = number % self.num_slots * self.slot_bytes
        return self._memory[start : start + self.slot_bytes]

    def settle(self) -> None:
        """Returns when what was written to or read from slots has happened: of the device that
        works now, which need not be the one that has the memory."""
        if self._memory.is_cuda:
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Let go of the memory; who else has it open keeps it."""
        self._memory = torch.empty(0, dtype=torch.uint8)


class HostShare(Slots):
    def __init__(self, slot_bytes: int, num_slots: int) -> None:
        self._file = os.memfd_create("eopd-weights", os.MFD_CLOEXEC)
        os.fchmod(self._file, 0o600)
        os.ftruncate(self._file, slot_bytes * num_slots)
        mapped = mmap.mmap(self._file, slot_bytes * num_slots)
        super().__init__(torch.frombuffer(mapped, dtype=torch.uint8), slot_bytes, num_slots)

    def handle(self) -> Handle:
        sizes = {"slot_bytes": self.slot_bytes, "num_slots": self.num_slots}
        return {"kind": "host", "pid": os.getpid(), "file": self._file, **sizes}

    def close(self) -> None:
        super().close()
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


class CudaShare(Slots):
    def __init__(self, slot_bytes: int, num_slots: int) -> None:
        memory = torch.empty(slot_bytes * num_slots, dtype=torch.uint8, device="cuda")
        super().__init__(memory, slot_bytes, num_slots)

    def handle(self) -> Handle:
        # Each call counts a reader, whom PyTorch waits for before the memory is used again.
        names = ("device", "memory", "bytes", "offset", "counter", "counter_offset", "event")
        shared = self._memory.untyped_storage()._share_cuda_()
        values = [part.hex() if isinstance(part, bytes) else part for part in shared]
        handle = dict(zip((*names, "waits_for_event"), values, strict=True))
        sizes = {"slot_bytes": self.slot_bytes, "num_slots": self.num_slots}
        return {"kind": "cuda", "uuid": _uuid(self._memory.device.index), **sizes, **handle}


Share = HostShare | CudaShare
"""The writer's. Its `handle` is for `open_share` in another process, as long as this one lives and
does not `close`."""


def make_share(device: torch.device, slot_bytes: int, num_slots: int) -> Share:
    kind = CudaShare if device.type == "cuda" else HostShare
    return kind(slot_bytes, num_slots)


def open_share(handle: Handle) -> Slots:
    """The reader's.

    Raises:
        OSError: the writer is gone, or is another user's.
    """
    memory = {"host": _open_on_host, "cuda": _open_on_gpu}[handle["kind"]](handle)
    return Slots(memory, handle["slot_bytes"], handle["num_slots"])


def _open_on_host(handle: Handle) -> torch.Tensor:
    file = os.open(path_of(handle["pid"], handle["file"]), os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = handle["slot_bytes"] * handle["num_slots"]
        mapped = mmap.mmap(file, size, prot=mmap.PROT_READ)
    finally:
        os.close(file)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _open_on_gpu(handle: Handle) -> torch.Tensor:
    index = _device_with(handle["uuid"])
    storage = torch.UntypedStorage._new_shared_cuda(
        index,
        bytes.fromhex(handle["memory"]),
        handle["bytes"],
        handle["offset"],
        bytes.fromhex(handle["counter"]),
        handle["counter_offset"],
        bytes.fromhex(handle["event"]),
        handle["waits_for_event"],
    )
    empty = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", index))
    return empty.set_(storage, 0, (handle["bytes"],))


def check_allocator(environment: Mapping[str, str], has_cuda: bool) -> None:
    """
    Raises:
        ConfigError: PyTorch would take memory that CUDA has no IPC handle for.
    """
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = environment.get(name, "")
        if has_cuda and "expandable_segments:true" in value.lower():
            raise ConfigError(
                f"{name}={value}: engines read the weights by CUDA IPC, which such memory does not "
                f"have. Leave expandable_segments out of it."
            )


def path_of(pid: int, file: int) -> str:
    """Where another process of the same user finds an open file of this one."""
    return f"/proc/{pid}/fd/{file}"


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _device_with(uuid: str) -> int:
    devices = [_uuid(index) for index in range(torch.cuda.device_count())]
    if uuid not in devices:
        raise ValueError(
            f"the weights lie on the GPU {uuid}, and this process sees {devices} alone"
        )
    return devices.index(uuid)
