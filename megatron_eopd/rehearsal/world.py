"""One rank of a job that is not there. In: its place. Out: a ParallelContext, until it is left.

Process groups are PyTorch's fake ones, in which every collective returns at once and changes
nothing; what travels as a Python object comes back as this rank sent it. The device is a GPU by
name. Its tensors are fake, so they have a shape and no memory, and lie on the CPU, because a build
of PyTorch without CUDA cannot even fake others.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_eopd.parallel.cpu import emulate_cuda
from megatron_eopd.parallel.init import ParallelContext, join_groups, leave_groups
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.rehearsal.answers import TOLD
from megatron_eopd.rehearsal.device import FakeDevice
from megatron_eopd.rehearsal.watch import Watch, place_of_caller

TIMEOUT_MINUTES = 1.0
"""Of groups in which nobody ever waits."""


@contextmanager
def fake_world(layout: Layout, watch: Watch) -> Iterator[ParallelContext]:
    """This process as the rank of the layout, everything that it does seen by `watch`. One such
    world at a time; the process is for nothing else afterwards."""
    emulate_cuda()
    dist.init_process_group(
        "fake", store=FakeStore(), rank=layout.rank, world_size=layout.world_size
    )
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.enter_context(_fake_groups())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watch)
        device = stack.enter_context(FakeDevice(watch))
        stack.enter_context(patch.object(FakeTensor, "tolist", lambda own: device.tolist(own)))
        yield join_groups(layout, torch.device("cuda", 0), TIMEOUT_MINUTES, seed=0)
        leave_groups()


@contextmanager
def _fake_groups() -> Iterator[None]:
    """Also where gloo is named, as for Python objects."""
    real = dist.new_group

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any):
        return real(ranks, timeout, "fake", **options)

    def all_gather_object(every: list, own: Any, *_: Any, **__: Any) -> None:
        every[:] = [own] * len(every)

    def broadcast_object_list(objects: list, *_: Any, **__: Any) -> None:
        if objects[0] is None:  # another rank speaks
            objects[0] = TOLD[place_of_caller()]

    with (
        patch.object(dist, "new_group", new_group),
        patch.object(dist, "all_gather_object", all_gather_object),
        patch.object(dist, "broadcast_object_list", broadcast_object_list),
    ):
        yield
