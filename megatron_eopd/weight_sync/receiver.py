"""The engine's side of a weight sync, inside every vLLM worker.

In: buckets in this host's memory, a ring of them for each pipeline stage. Out: vLLM's own
parameters, through its layerwise reload, because they lie packed and cannot be written in place.
Importing this module registers the transport `eopd` with vLLM; `worker_extension_cls` names
`WorkerExtension` for just that, since registration has to happen in the worker's process.

A fault during an update is remembered, not raised: the reload is finalised all the same, so that
every worker answers every call, no meta tensor stays behind, and the next complete sync is exact.
Until then the worker is poisoned: its weights are a mixture.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait

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

from megatron_eopd.errors import TransferError
from megatron_eopd.weight_sync.buckets import unpack
from megatron_eopd.weight_sync.manifest import Bucket, Manifest
from megatron_eopd.weight_sync.ring import RingReader

BACKEND = "eopd"


@dataclass(kw_only=True)
class InitInfo(WeightTransferInitInfo):
    manifest: str
    """Manifest.to_json()."""
    digest: str


@dataclass(kw_only=True)
class UpdateInfo(WeightTransferUpdateInfo):
    digest: str
    timeout_s: float
    """For the whole update."""


class EopdReceiver(WeightTransferEngine):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.fault: str | None = "no weights have been received yet"
        """Why this worker must not generate; None once a complete update is in."""
        self._readers: list[RingReader] = []

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.manifest = Manifest.from_json(init_info.manifest)
        if self.manifest.digest != init_info.digest:
            raise ValueError(
                f"the manifest changed on its way: digest {self.manifest.digest} here, "
                f"{init_info.digest} in the trainer"
            )

    def attach(self, addresses: str) -> None:
        """Open each stage's ring for the update that follows. `addresses`: JSON, of each worker."""
        self._detach()
        self._readers = [RingReader(a) for a in json.loads(addresses)[self.parallel_config.rank]]

    def _detach(self) -> None:
        for reader in self._readers:
            reader.close()
        self._readers = []

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
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:
            self._remember(error)
        finally:
            self._detach()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.digest != self.manifest.digest:
            raise ValueError(
                f"the trainer sends by manifest {update_info.digest}, the engine was told "
                f"{self.manifest.digest} at start-up"
            )
        deadline = time.monotonic() + update_info.timeout_s
        for bucket, buffer in take_all(self._readers, self.manifest.stages, deadline):
            if self._update_fault is None:
                try:
                    self._load(bucket, buffer)
                except Exception as error:
                    # The others are taken all the same: the one fault reported is the cause.
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
        self._detach()


def take_all(
    readers: Sequence[RingReader], stages: Sequence[Sequence[Bucket]], deadline: float
) -> Iterator[tuple[Bucket, torch.Tensor]]:
    """Every bucket of every stage with its bytes, as they come: the stages in any order.

    Raises:
        TransferError: a writer gave up or is gone, or the deadline passed.
    """
    left = {
        reader: iter(stage) for reader, stage in zip(readers, stages, strict=True) if len(stage)
    }
    following = {reader: next(buckets) for reader, buckets in left.items()}
    while following:
        ready = wait(list(following), max(deadline - time.monotonic(), 0))
        if not ready:
            raise TransferError("the buckets did not all arrive in time")
        for reader in ready:
            yield following[reader], reader.take()
            bucket = next(left[reader], None)
            if bucket is None:
                del following[reader]
            else:
                following[reader] = bucket


class WorkerExtension:
    """Mixed into vLLM's worker; its methods are called through `collective_rpc`."""

    def weights_fault(self) -> str | None:
        return self.weight_transfer_engine.fault  # type: ignore[attr-defined]

    def attach_readers(self, addresses: str) -> None:
        self.weight_transfer_engine.attach(addresses)  # type: ignore[attr-defined]

    def forget_weights(self) -> None:
        """They are gone, as after sleep."""
        self.weight_transfer_engine.fault = "asleep, and no weights since"  # type: ignore[attr-defined]


WeightTransferEngineFactory.register_engine(BACKEND, EopdReceiver)
