"""The engine's side of a weight sync, inside every vLLM worker.

In: the bytes of each stage's buckets. Out: vLLM's own parameters, through its layerwise reload,
because they lie packed and cannot be written in place. Importing this module registers the
transports `eopd_gloo` and `eopd_nccl` with vLLM; `worker_extension_cls` names `WorkerExtension`
for just that, since registration has to happen in the worker's process.

A fault during an update is remembered, not raised: the rest of the update is still drained and
the reload finalised, so that every worker answers every call, no meta tensor stays behind, and the
next complete sync is exact. Until then the worker is poisoned: its weights are a mixture.
"""

import queue
import threading
import time
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from megatron_eopd.weight_sync.buckets import buffer_bytes, unpack
from megatron_eopd.weight_sync.communicator import (
    Communicator,
    TransferError,
    join_store,
    make_communicator,
)
from megatron_eopd.weight_sync.manifest import Bucket, Manifest


@dataclass(kw_only=True)
class InitInfo(WeightTransferInitInfo):
    manifest: str
    """Manifest.to_json()."""
    digest: str
    addresses: list[tuple[str, int]]
    """Host and port of each stage's leader, in the manifest's order of stages."""
    timeout_s: float


@dataclass(kw_only=True)
class UpdateInfo(WeightTransferUpdateInfo):
    digest: str
    timeout_s: float


@dataclass(frozen=True)
class Arrival:
    """What a stage's receiving thread hands on: a bucket, or that the stage is over."""

    bucket: Bucket = ()
    buffer: torch.Tensor | None = None
    error: Exception | None = None


class EopdReceiver(WeightTransferEngine):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    backend: str

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._communicators: list[Communicator] = []
        self.fault: str | None = "no weights have been received yet"
        """Why this worker must not generate; None once a complete update is in."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        self.manifest = Manifest.from_json(init_info.manifest)
        if self.manifest.digest != init_info.digest:
            raise ValueError(
                f"the manifest changed on its way: digest {self.manifest.digest} here, "
                f"{init_info.digest} in the trainer"
            )
        world_size = 1 + self.parallel_config.world_size
        self._communicators = [
            make_communicator(
                self.backend,
                join_store(host, port, init_info.timeout_s),
                rank=1 + self.parallel_config.rank,
                world_size=world_size,
                timeout_s=init_info.timeout_s,
            )
            for host, port in init_info.addresses
        ]

    def start_weight_update(self) -> None:
        self._expected_parameters = dict(self.model.named_parameters()).keys()
        self._arrived_names: set[str] = set()
        self._loaded_parameters: set[str] = set()
        self._update_fault: str | None = None
        self.fault = "a weight update began and has not been completed"
        if current_platform.is_cpu():
            self._have_experts_packed_again()
        initialize_layerwise_reload(self.model)

    def _have_experts_packed_again(self) -> None:
        """vLLM's CPU kernel for experts multiplies by weights that it packs when it is built. An
        update finds it built and copies plain weights into the packed ones: of another size, or
        with another meaning. No CUDA graph holds on to these, so it may be built anew."""
        for module in self.model.modules():
            method = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None

    def update_weights(self, update_info: dict) -> None:
        # The base class synchronises torch.accelerator afterwards, which raises on a CPU.
        info = self.parse_update_info(update_info)
        try:
            self.receive_weights(info)
        except Exception as error:
            self.shutdown()  # lets go of the leaders that still send
            self._remember(error)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """One thread per stage receives, this one loads. So no order between the stages is
        prescribed, and no leader ever waits for another one's gather."""
        if update_info.digest != self.manifest.digest:
            raise ValueError(
                f"the trainer sends by manifest {update_info.digest}, the engine was told "
                f"{self.manifest.digest} at start-up"
            )
        deadline = time.monotonic() + update_info.timeout_s
        # One bucket waits while another loads; with more, a slow load would fill the memory.
        arrivals: queue.Queue[Arrival] = queue.Queue(maxsize=1)
        stop = threading.Event()
        for communicator, stage in zip(self._communicators, self.manifest.stages, strict=True):
            threading.Thread(
                target=_receive_stage,
                args=(communicator, stage, arrivals, stop, deadline),
                name="weight-sync",
                daemon=True,
            ).start()
        try:
            self._load_arrivals(arrivals, deadline)
        finally:
            stop.set()

    def _load_arrivals(self, arrivals: queue.Queue[Arrival], deadline: float) -> None:
        """Transport errors raise: that group is lost. A bad bucket is remembered and the transfer
        goes on, so that the leaders finish and the one error reported is the cause."""
        open_stages = len(self.manifest.stages)
        while open_stages:
            try:
                arrival = arrivals.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                raise TransferError("the buckets did not all arrive in time") from None
            if arrival.error is not None:
                raise arrival.error
            if arrival.buffer is None:
                open_stages -= 1
            elif self._update_fault is None:
                try:
                    self._load(arrival.bucket, arrival.buffer)
                except Exception as error:
                    self._remember(error)

    def _load(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        named_tensors = unpack(bucket, buffer)
        self._arrived_names.update(name for name, _ in named_tensors)
        self._loaded_parameters.update(self.model.load_weights(iter(named_tensors)) or ())

    def finish_weight_update(self) -> None:
        """Runs after a fault as well: the reload must not stay open."""
        try:
            if self._update_fault is None:
                self._check_complete()
        except Exception as error:
            self._remember(error)
        try:
            with torch.no_grad():
                finalize_layerwise_reload(self.model, self.model_config)
                self._redispatch_lm_head()
            self._check_no_meta_tensor()
        except Exception as error:
            self._remember(error)
        self.fault = self._update_fault

    def _check_complete(self) -> None:
        missing = set(self.manifest.names) - self._arrived_names
        assert not missing, f"never arrived: {sorted(missing)}"
        stale = self._expected_parameters - self._loaded_parameters
        # Some models report nothing; then the probe is what finds a parameter left behind.
        if stale and self._loaded_parameters:
            raise ValueError(f"the manifest has nothing for the engine's {sorted(stale)}")

    def _redispatch_lm_head(self) -> None:
        """On CPU the head multiplies by a packed copy. With tied embeddings no tensor of its own
        arrives, so the reload leaves the copy of the weights before."""
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def _check_no_meta_tensor(self) -> None:
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        meta = [name for name, tensor in tensors if tensor.is_meta]
        assert not meta, f"left without memory by the reload: {meta}"

    def _remember(self, error: Exception) -> None:
        if self._update_fault is None:
            self._update_fault = f"{type(error).__name__}: {error}"

    def shutdown(self) -> None:
        for communicator in self._communicators:
            communicator.abort()
        self._communicators = []


def _receive_stage(
    communicator: Communicator,
    stage: tuple[Bucket, ...],
    arrivals: queue.Queue[Arrival],
    stop: threading.Event,
    deadline: float,
) -> None:
    """Always ends with an Arrival that carries no buffer."""
    error: Exception | None = None
    try:
        for bucket in stage:
            # A fresh buffer each time: the layerwise reload keeps views of it until a layer is
            # complete, which may be a bucket later.
            buffer = torch.empty(
                buffer_bytes(bucket), dtype=torch.uint8, device=communicator.device
            )
            communicator.broadcast(buffer, timeout_s=deadline - time.monotonic())
            if not _hand_over(Arrival(bucket, buffer), arrivals, stop):
                return
    except Exception as caught:
        error = caught
    _hand_over(Arrival(error=error), arrivals, stop)


def _hand_over(arrival: Arrival, arrivals: queue.Queue[Arrival], stop: threading.Event) -> bool:
    """False when nobody reads any more. Returning lets go of the group, and so of its leader."""
    while not stop.is_set():
        try:
            arrivals.put(arrival, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


class GlooReceiver(EopdReceiver):
    backend = "gloo"


class NcclReceiver(EopdReceiver):
    backend = "nccl"


class WorkerExtension:
    """Mixed into vLLM's worker; its methods are called through `collective_rpc`."""

    def weights_fault(self) -> str | None:
        return self.weight_transfer_engine.fault  # type: ignore[attr-defined]


for _receiver in (GlooReceiver, NcclReceiver):
    WeightTransferEngineFactory.register_engine(f"eopd_{_receiver.backend}", _receiver)
