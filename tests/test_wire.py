"""How messages are handed to NCCL, with a group that only writes down what is asked of it."""

from datetime import timedelta

import pytest
import torch

from megatron_eopd.errors import WireError
from megatron_eopd.parallel.wire import JointWire


class RecordingWork:
    def __init__(self, calls: list, name: str) -> None:
        self._calls, self._name = calls, name

    def wait(self, timeout: timedelta) -> None:
        self._calls.append(("wait", self._name))


class RecordingGroup:
    def __init__(self, *, supports_coalescing: bool, fails: bool = False) -> None:
        self.supports_coalescing = supports_coalescing
        self.calls: list = []
        self._fails = fails

    def send(self, tensors: list, rank: int, tag: int) -> RecordingWork:
        if self._fails:
            raise RuntimeError("NCCL communicator was aborted on rank 0. More of it.")
        self.calls.append(("send", rank))
        return RecordingWork(self.calls, f"send to {rank}")

    def recv(self, tensors: list, rank: int, tag: int) -> RecordingWork:
        self.calls.append(("recv", rank))
        return RecordingWork(self.calls, f"recv from {rank}")

    def _start_coalescing(self) -> None:
        self.calls.append("start")

    def _end_coalescing(self) -> RecordingWork:
        self.calls.append("end")
        return RecordingWork(self.calls, "all")


def wire_over(group: RecordingGroup) -> JointWire:
    wire = JointWire.__new__(JointWire)
    wire._group, wire._timeout, wire._pending = group, timedelta(minutes=1), []
    return wire


def messages(*ranks: int) -> list[tuple[int, torch.Tensor]]:
    return [(rank, torch.zeros(1)) for rank in ranks]


def test_nccl_gets_the_messages_of_a_call_as_one_group():
    """Both directions in it, and one wait for what is received."""
    group = RecordingGroup(supports_coalescing=True)
    wire_over(group).swap(messages(1, 2), messages(2, 3))
    sent = [("send", 1), ("send", 2)]
    received = [("recv", 2), ("recv", 3)]
    assert group.calls == ["start", *sent, *received, "end", ("wait", "all")]


def test_what_is_only_sent_is_waited_for_by_flush():
    group = RecordingGroup(supports_coalescing=True)
    wire = wire_over(group)
    wire.swap(messages(1), [])
    assert group.calls == ["start", ("send", 1), "end"]
    wire.flush()
    wire.flush()
    assert group.calls[3:] == [("wait", "all")]


def test_no_message_is_no_group():
    """An empty group would give no work to wait for."""
    group = RecordingGroup(supports_coalescing=True)
    wire_over(group).swap([], [])
    assert group.calls == []


def test_a_group_is_closed_when_a_message_fails():
    group = RecordingGroup(supports_coalescing=True, fails=True)
    with pytest.raises(WireError, match=r"^NCCL communicator was aborted on rank 0\.$"):
        wire_over(group).swap(messages(1), [])
    assert group.calls == ["start", "end"]


def test_gloo_gets_them_one_by_one():
    group = RecordingGroup(supports_coalescing=False)
    wire_over(group).swap(messages(1), messages(2, 3))
    sent, received = [("send", 1)], [("recv", 2), ("recv", 3)]
    assert group.calls == [*sent, *received, ("wait", "recv from 2"), ("wait", "recv from 3")]
    assert not torch.distributed.ProcessGroupGloo.supports_coalescing.fget(make_gloo()), (
        "gloo has learned it: then its messages can go as one, too"
    )


def make_gloo() -> torch.distributed.ProcessGroupGloo:
    store = torch.distributed.HashStore()
    return torch.distributed.ProcessGroupGloo(store, 0, 1, timedelta(minutes=1))
