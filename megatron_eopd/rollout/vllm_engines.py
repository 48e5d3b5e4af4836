"""Rollouts through vLLM, on all ranks of the student. In: prompts, weights. Out: rollouts.

As many vLLM engines as the ranks hold, each in a child process of the rank that owns it. They load
while the trainer builds its models, with dummy weights: nothing is generated before the first
`update_weights`. Rank 0 leads (rollout.fleet), the other owners carry its requests to their
engines and the replies back (rollout.relay), and what it finds out all ranks learn by a broadcast.

A weight sync, stage by stage of the pipeline:

    rank 0       ── load ──▶ owners ──▶ engines' workers ◀── buckets, in their host's memory ──┐
    all ranks    ── export: gather a bucket ──▶ stage's leader ──▶ own host's memory ──────────┤
                                                      └──▶ one rank of each other host ────────┘
    rank 0       ── commit, probe ──▶ engines;  all ranks agree on the outcome
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_eopd.config import WeightSyncConfig
from megatron_eopd.errors import EngineError
from megatron_eopd.parallel.collectives import (
    collecting,
    from_rank_zero,
    gather_everywhere,
    raise_together,
)
from megatron_eopd.parallel.farewell import Farewell
from megatron_eopd.parallel.wire import JointWire
from megatron_eopd.records import Prompt, Rollout, RolloutProgress
from megatron_eopd.rollout.drawing import Drawing
from megatron_eopd.rollout.engine import Finished, Sampling, SyncReport, numbered_samples
from megatron_eopd.rollout.fleet import Fleet
from megatron_eopd.rollout.messages import Sample, SampleRequest
from megatron_eopd.rollout.relay import Relay, serve
from megatron_eopd.rollout.weights import WeightLoading
from megatron_eopd.weight_sync.manifest import Manifest
from megatron_eopd.weight_sync.outlet import Outlet, TransferTimes
from megatron_eopd.weight_sync.verify import Logprobs, Probe, SyncCheck

T = TypeVar("T")
PARTS = tuple(part.name for part in fields(TransferTimes))
Job = tuple[Prompt, int, int]
"""A prompt, which of its samples, and the seed."""


@dataclass(frozen=True)
class Own:
    """What a rank has to do with engines itself."""

    relay: Relay | None
    """To the engine that it owns."""
    wire: JointWire | None
    """Between rank 0 and the other owners; None where there are none, or this is neither."""
    outlet: Outlet
    node: int
    """The number of this rank's host."""
    readers: Mapping[int, int]
    """The workers of each engine on this rank's host."""


class VllmEngines:
    """A RolloutEngine; see megatron_eopd.rollout.engine for what its methods promise."""

    name = "vLLM"
    compares_weights = True

    def __init__(
        self,
        fleet: Fleet | None,
        own: Own,
        manifest: Manifest,
        *,
        max_model_len: int,
        weight_sync: WeightSyncConfig,
        sleeps: bool,
        score: Callable[[Sequence[Sequence[int]]], Logprobs],
        check: SyncCheck,
        cpu_group: dist.ProcessGroup,
        must_leave: Callable[[], str | None] = lambda: None,
        watch: Callable[[RolloutProgress], None] = lambda progress: None,
    ) -> None:
        """Collective: returns once the engines are ready, on every rank.

        fleet: on rank 0; None on the others.
        sleeps: whether engines share the trainer's devices.
        score: the trainer's own log-probabilities, collective.
        cpu_group: gloo, all of the student's ranks. They wait in it for rank 0, so its time-out
            must be longer than every time-out of `rollout` and `weight_sync`.
        must_leave: asked on rank 0 while it waits for responses: why it cannot any longer. Then all
            ranks are Interrupted, and the engines are gone.
        watch: hears on rank 0 how a call goes on.
        """
        self._fleet, self._own, self._manifest = fleet, own, manifest
        self._max_model_len, self._weight_sync = max_model_len, weight_sync
        self._sleeps, self._score, self._check = sleeps, score, check
        self._group, self._must_leave, self._watch = cpu_group, must_leave, watch
        self._version: int | None = None
        self._probes: Sequence[Sequence[int]] = ()
        self._drawings: list[Drawing] = []  # on rank 0, since metrics were asked
        try:
            self._led(Fleet.wait_for_start)
        except Exception as error:
            self.close(error)  # ranks of engines alone wait for a word
            raise

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: Finished | None = None
    ) -> list[Rollout]:
        jobs = numbered_samples(prompts, sampling)
        groups = self._requests(jobs, sampling)
        rollouts: dict[int, Rollout] = {}

        def take(sample: Sample) -> None:
            prompt, i, _ = jobs[sample.number]
            rollouts[sample.number] = self._to_rollout(prompt, i, sample)
            if finished is not None:
                finished(sample.number, rollouts[sample.number])

        drawing = None
        if self._fleet is not None:
            drawing = Drawing(self._fleet, groups, take, self._must_leave, self._watch)
            self._drawings.append(drawing)
        while not self._led(lambda _: drawing.go_on()):
            # All that held the weights have died; what is here of the responses stays.
            report = self._sync(self._version)
            if report.is_unsound:
                raise EngineError(report.probe.message)
        return from_rank_zero(lambda: [rollouts[n] for n in range(len(jobs))], self._group)

    def update_weights(self, version: int, probes: Sequence[Sequence[int]] = ()) -> SyncReport:
        self._probes = probes if self._weight_sync.verify else ()
        report = self._sync(version)
        self._version = version
        return report

    @contextmanager
    def asleep(self) -> Iterator[None]:
        if self._sleeps:
            on_same_devices = torch.cuda.is_available()
            self._led(lambda fleet: fleet.sleep(on_same_devices=on_same_devices))
        yield

    def metrics(self) -> dict[str, float]:
        drawings, self._drawings = self._drawings, []
        if self._fleet is None:
            return {}
        return engine_metrics(self._fleet, drawings)

    def close(self, error: BaseException | None = None) -> None:
        if self._fleet is not None:
            self._fleet.end(Farewell.after(error))
        if self._own.relay is not None:
            self._own.relay.close()
        self._own.outlet.close()

    def _led(self, work: Callable[[Fleet], T]) -> T:
        """What rank 0 does with the engines, on every rank, while their owners serve it."""

        def lead() -> T:
            try:
                return work(self._fleet)
            finally:
                self._fleet.rest()

        if self._fleet is None and self._own.relay is not None:
            serve(self._own.wire, self._own.relay)
        return from_rank_zero(lead, self._group)

    # Weights.

    def _sync(self, version: int) -> SyncReport:
        """Until at least one engine holds them."""
        while True:
            report = self._try_sync(version)
            if report is not None:
                return report

    def _try_sync(self, version: int) -> SyncReport | None:
        """None: every engine died on the way."""
        begin, loading = time.monotonic(), None
        if self._fleet is not None:
            loading = WeightLoading(self._fleet, self._manifest, self._weight_sync.timeout_s)
        if self._sleeps and torch.cuda.is_available():
            torch.cuda.empty_cache()  # engines that wake need what training has let go of
        taking = self._led(lambda _: loading.begin(self._must_leave))
        num_readers = sum(count for n, count in self._own.readers.items() if n in taking)
        opened = (self._own.node, self._own.outlet.open(num_readers))
        addresses = gather_everywhere(opened, self._group)
        self._led(lambda _: loading.post(addresses))
        errors: list[Exception] = []
        times = None
        with collecting(errors):
            times = self._own.outlet.run()
        with collecting(errors):
            load_s = self._led(lambda _: loading.finish())
        try:
            raise_together(errors, self._group)
        except Exception as error:
            raise EngineError(str(error)) from error
        if load_s is None or not self._led(lambda _: loading.commit(version)):
            return None
        every = gather_everywhere(times, self._group)
        parts = {part: max(getattr(one, part) for one in every) for part in PARTS}
        seconds = time.monotonic() - begin
        probe = self._compare(version, loading)
        parts |= {"load": load_s, "probe": time.monotonic() - begin - seconds}
        report = SyncReport(version, seconds, self._manifest.num_bytes, parts, probe)
        # One rank's clock and judgement for all: on GPUs replicas need not agree to the last bit.
        return self._led(lambda fleet: report if fleet.serving or report.is_unsound else None)

    def _compare(self, version: int, loading: WeightLoading | None) -> Probe | None:
        if not self._probes:
            self._led(lambda _: loading.serve())
            return None
        scores = self._led(lambda _: loading.score(self._probes))
        trainer = self._score(self._probes)
        return self._led(lambda _: loading.prove(scores, trainer, self._check, version))

    # Responses.

    def _requests(self, jobs: Sequence[Job], sampling: Sampling) -> list[list[SampleRequest]]:
        """In groups of the same prompt."""
        groups: dict[int, list[SampleRequest]] = {}
        for number, (prompt, _, seed) in enumerate(jobs):
            self._check_length(prompt, sampling)
            group = number // sampling.samples_per_prompt
            groups.setdefault(group, []).append(
                SampleRequest(
                    number=number,
                    group=group,
                    prompt_ids=list(prompt.prompt_ids),
                    seed=seed,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_response_length,
                    stop_ids=list(sampling.stop_ids),
                )
            )
        return list(groups.values())

    def _check_length(self, prompt: Prompt, sampling: Sampling) -> None:
        num_tokens, num_new_tokens = len(prompt.prompt_ids), sampling.max_response_length
        if num_tokens + num_new_tokens > self._max_model_len:
            raise ValueError(
                f"prompt {prompt.index} has {num_tokens} tokens, and with {num_new_tokens} more it "
                f"passes the engine's max_model_len={self._max_model_len}. Lower "
                f"data.max_prompt_length or rollout.max_response_length."
            )

    def _to_rollout(self, prompt: Prompt, sample_index: int, sample: Sample) -> Rollout:
        if sample.weight_versions != [str(self._version)]:
            raise EngineError(
                f"response {sample_index} of prompt {prompt.index} was written by weight versions "
                f"{sample.weight_versions}, the engine was last given {self._version}"
            )
        if sample.finish_reason not in ("stop", "length"):
            raise EngineError(
                f"response {sample_index} of prompt {prompt.index} ended with "
                f"{sample.finish_reason!r} after {len(sample.response_ids)} tokens"
            )
        if not all(map(math.isfinite, sample.response_logprobs)):
            raise EngineError(
                f"response {sample_index} of prompt {prompt.index} has log-probabilities that are "
                f"not finite: the engine computes nonsense"
            )
        return Rollout(
            prompt=prompt,
            sample_index=sample_index,
            response_ids=tuple(sample.response_ids),
            response_logprobs=tuple(sample.response_logprobs),
            finish_reason=sample.finish_reason,
            weight_version=self._version,
        )


def engine_metrics(fleet: Fleet, drawings: Sequence[Drawing]) -> dict[str, float]:
    """Of these calls, and of all restarts so far."""
    scalars = {"engine/alive": len(fleet.serving)}
    seconds = sum(drawing.seconds for drawing in drawings)
    if seconds:
        waits = [drawing.queue_wait_s for drawing in drawings]
        scalars["engine/queue_wait_s"] = sum(waits) / len(waits)
    for handle in fleet.handles:
        name, uses = f"engine/{handle.number}", [d.use[handle.number] for d in drawings]
        for count in ("restarts", "failed_requests", "failed_probes"):
            scalars[f"{name}/{count}"] = getattr(handle.life, count)
        if seconds:
            scalars |= {
                f"{name}/tokens_per_s": sum(use.tokens for use in uses) / seconds,
                f"{name}/requests_in_flight": sum(use.request_s for use in uses) / seconds,
                f"{name}/idle_share": 1 - sum(use.busy_s for use in uses) / seconds,
            }
    return scalars
