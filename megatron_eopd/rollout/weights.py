"""One weight sync, led by rank 0. In: engines that run. Out: those that hold the version, or none.

Every version is committed by all engines that live, or by none of them. An engine that dies on the
way takes nothing with it: what reads the buckets is left out, and it joins the next sync.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_eopd.errors import EngineError
from megatron_eopd.rollout.fleet import Fleet, MustLeave, never
from megatron_eopd.rollout.handle import EngineHandle
from megatron_eopd.rollout.messages import Orders
from megatron_eopd.rollout.states import State
from megatron_eopd.weight_sync.manifest import Manifest
from megatron_eopd.weight_sync.ring import Address
from megatron_eopd.weight_sync.verify import Logprobs, Probe, SyncCheck

DOING = "taking the weights"
Addresses = Mapping[int, Sequence[Address]]
"""By pipeline stage, of the engine workers of one host in their order."""


class WeightLoading:
    def __init__(self, fleet: Fleet, manifest: Manifest, timeout_s: float) -> None:
        self._fleet, self._manifest, self._timeout_s = fleet, manifest, timeout_s
        self._handles: list[EngineHandle] = []
        self._by_node: dict[int, list[Addresses]] = {}
        self._loads: dict[int, int] = {}

    def begin(self, must_leave: MustLeave = never) -> list[int]:
        """The engines that take part: all that run. If none does, one is waited for."""
        fleet = self._fleet
        fleet.wait_for_start(must_leave)
        for handle in fleet.serving:
            handle.life.falls_behind()
        self._handles = [h for h in fleet.handles if h.life.state == State.STALE]
        for handle in fleet.forwarders:
            handle.link.tell(Orders(open_outlet=self._num_readers(handle.seat.node)))
        for handle in fleet.forwarders:
            self._by_node.setdefault(handle.seat.node, []).append(handle.link.hear().addresses)
        return [h.number for h in self._handles]

    def post(self, students: Sequence[tuple[int, Addresses]]) -> None:
        """Tell the engines where the buckets will be. `students`: of each of the student's ranks,
        its host and what it hands over there."""
        for node, addresses in students:
            self._by_node.setdefault(node, []).append(addresses)
        attached = self._fleet.answers(
            {h.number: h.post("attach", **self._where(h)) for h in self._handles if h.life.runs},
            self._timeout_s,
            "opening the memory of the weights",
        )
        self._handles = [h for h in self._handles if h.number in attached]
        update_info = {"digest": self._manifest.digest, "timeout_s": self._whole_timeout_s}
        for handle in self._handles:
            self._loads[handle.number] = handle.post("load", update_info=update_info)
        self._fleet.exchange()
        for handle in self._fleet.forwarders:
            handle.link.tell(Orders(run_outlet=True))

    def finish(self) -> float | None:
        """Until all that live have loaded: the longest time that one took. None if none did.

        Raises:
            EngineError: none could, and they live; or a host could not be reached.
        """
        fleet = self._fleet
        failed = [report.error for report in (h.link.hear() for h in fleet.forwarders)]
        seconds = fleet.answers(self._loads, self._timeout_s, DOING)
        if any(failed):
            raise EngineError("; ".join(filter(None, failed)))
        self._handles = [h for h in self._handles if h.number in seconds]
        return max(seconds.values(), default=None)

    def commit(self, version: int) -> bool:
        """Whether any engine has it now."""
        done = self._fleet.ask(
            self._handles, "commit", self._timeout_s, "committing", version=version
        )
        self._handles = [h for h in self._handles if h.number in done]
        return bool(self._handles)

    def score(self, sequences: Sequence[Sequence[int]]) -> dict[int, Logprobs]:
        """By engine."""
        ids = [list(sequence) for sequence in sequences]
        doing = f"scoring {len(ids)} sequences"
        scores = self._fleet.ask(self._handles, "score", self._timeout_s, doing, sequences=ids)
        self._handles = [h for h in self._handles if h.number in scores]
        return scores

    def prove(
        self, scores: Mapping[int, Logprobs], trainer: Logprobs, check: SyncCheck, version: int
    ) -> Probe | None:
        """Compare each engine with the trainer, and have those serve that hold its weights. One
        that does not, while others do, is killed. The worst of what was found of those that serve;
        of all where none is sound."""
        probes = {n: check.judge(scores[n], trainer, version) for n in scores}
        unsound = [n for n, probe in probes.items() if probe.verdict == "stop"]
        for number in unsound if len(unsound) < len(probes) else []:
            self._fleet.handles[number].life.failed_probes += 1
            self._fleet.handles[number].die(probes.pop(number).message)
        if len(unsound) == len(scores):
            return max(probes.values(), key=lambda probe: probe.rank, default=None)
        self._fleet.exchange()  # kills them
        self.serve()
        return max(probes.values(), key=lambda probe: probe.rank, default=None)

    def serve(self) -> None:
        """From now on these serve."""
        for handle in self._handles:
            if handle.life.state == State.STALE:
                handle.life.proved()

    @property
    def _whole_timeout_s(self) -> float:
        """For a worker that waits for all buckets: every one may take the time that one may."""
        return self._timeout_s * (1 + sum(map(len, self._manifest.stages)))

    def _where(self, handle: EngineHandle) -> dict[str, Any]:
        addresses = json.dumps(self._addresses_of(handle))
        return {"addresses": addresses, "timeout_s": self._timeout_s}

    def _num_readers(self, node: int) -> int:
        return sum(len(h.seat.ranks) for h in self._handles if h.seat.node == node)

    def _addresses_of(self, handle: EngineHandle) -> list[list[Address]]:
        """For each of its workers, of every stage."""
        stages: dict[int, Sequence[Address]] = {}
        for addresses in self._by_node[handle.seat.node]:
            stages |= addresses
        before = sum(
            len(h.seat.ranks)
            for h in self._handles
            if h.seat.node == handle.seat.node and h.number < handle.number
        )
        workers = range(before, before + len(handle.seat.ranks))
        return [[stages[stage][worker] for stage in sorted(stages)] for worker in workers]
