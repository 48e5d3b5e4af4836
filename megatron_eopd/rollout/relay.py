"""Between rank 0, which leads the engines, and the rank that owns one. In: Orders. Out: a Report.

The owner knows nothing of queues and states: it starts and kills its engine's process, and carries
requests and replies. In one exchange rank 0 tells every owner its orders and then hears every
report, so nobody has to listen to two at once.
"""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from megatron_eopd.errors import WireError
from megatron_eopd.parallel.collectives import lost_rank
from megatron_eopd.parallel.farewell import Farewell
from megatron_eopd.parallel.wire import JointWire
from megatron_eopd.rollout.engine_process import EngineProcess
from megatron_eopd.rollout.messages import Orders, Reply, Report, Request
from megatron_eopd.rollout.vllm_options import EngineSpec
from megatron_eopd.weight_sync.outlet import Outlet

POLL_S = 0.02
"""An owner waits so long for a reply before it reports that there is none."""
START = 0
"""The number of the request that starts an engine."""


class Relay:
    """Of one engine, on the rank that owns it."""

    def __init__(self, spec: EngineSpec) -> None:
        """Starts the engine's process; main thread, see EngineProcess."""
        self._spec = spec
        self._process = self._launch()

    def exchange(self, orders: Orders, wait_s: float = POLL_S) -> Report:
        if orders.kill or orders.start:
            self._process.kill()
        if orders.start:
            self._process = self._launch()
            return Report()
        process = self._process
        for request in orders.requests:
            process.post(request)
        replies = tuple(process.replies(wait_s))
        self._is_starting &= not replies
        last_line = process.last_line() if self._is_starting else ""
        death = _failed_start(replies, process) or process.death()
        if death is not None:
            replies += tuple(process.replies(0))  # what came just before
        return Report(replies, death, last_line)

    def close(self) -> None:
        self._process.close()

    def _launch(self) -> EngineProcess:
        process, self._is_starting = self._spec.launch(), True
        process.post(Request(START, "start", {"llm_arguments": dict(self._spec.arguments)}))
        return process


def _failed_start(replies: Sequence[Reply], process: EngineProcess) -> str | None:
    for reply in replies:
        if reply.number == START and reply.error is not None:
            process.kill()
            return f"it failed to start: {reply.error}.\n{process.log_tail()}"
    return None


class Link(Protocol):
    """Rank 0's way to one relay."""

    def tell(self, orders: Orders) -> None: ...

    def hear(self) -> Report: ...

    def flush(self) -> None:
        """Returns when what was told has been heard."""
        ...


class OwnLink:
    """To the relay of rank 0 itself."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._orders = Orders()

    def tell(self, orders: Orders) -> None:
        self._orders = orders

    def hear(self) -> Report:
        return self._relay.exchange(self._orders)

    def flush(self) -> None: ...


class WireLink:
    """To the relay of another rank."""

    def __init__(self, wire: JointWire, place: int) -> None:
        """`place`: the owner's on the wire, on which rank 0 has place 0."""
        self._wire, self._place = wire, place

    def tell(self, orders: Orders) -> None:
        with _naming("leading the engines"):
            send(self._wire, self._place, orders)

    def hear(self) -> Report:
        with _naming("leading the engines"):
            return receive(self._wire, self._place)

    def flush(self) -> None:
        with _naming("leading the engines"):
            self._wire.flush()


def serve(wire: JointWire, relay: Relay | None, outlet: Outlet | None = None) -> Farewell | None:
    """What a rank other than 0 does until rank 0 lets it rest: its farewell, if that is the end of
    the run. `relay`: None on a rank whose device is one of an engine that another rank owns.

    Raises:
        LostRankError: rank 0 is gone, or late.
    """
    while True:
        with _naming("serving an engine"):
            orders: Orders = receive(wire, 0)
        if orders.end is not None or orders.rest:
            return orders.end
        if orders.open_outlet is not None:
            report = Report(addresses=outlet.open(orders.open_outlet))
        elif orders.run_outlet:
            report = _run(outlet)
        else:
            report = relay.exchange(orders)
        with _naming("serving an engine"):
            send(wire, 0, report)


@contextmanager
def _naming(stage: str) -> Iterator[None]:
    try:
        yield
    except WireError as error:
        raise lost_rank(error, stage) from error


def _run(outlet: Outlet) -> Report:
    try:
        outlet.run()
    except Exception as error:
        return Report(error=f"{type(error).__name__}: {error}")
    return Report()


def send(wire: JointWire, place: int, message: Orders | Report) -> None:
    data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
    wire.flush()  # of the message before
    wire.swap([(place, torch.tensor([data.numel()])), (place, data)], [])


def receive(wire: JointWire, place: int) -> Orders | Report:
    size = torch.empty(1, dtype=torch.int64)
    wire.swap([], [(place, size)])
    data = torch.empty(size.item(), dtype=torch.uint8)
    wire.swap([], [(place, data)])
    return pickle.loads(data.numpy().tobytes())
