"""The engines of a run, opened where the configuration puts them. In: Config. Out: an engine."""

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore

from megatron_eopd.config import Config
from megatron_eopd.errors import EngineError, Interrupted, LostRankError, WireError
from megatron_eopd.interruption import Interruption
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.models.export import Exporter
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.parallel.collectives import lost_rank
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.wire import JointWire
from megatron_eopd.preflight import Inputs
from megatron_eopd.rollout.engine import RolloutEngine
from megatron_eopd.rollout.fleet import Fleet
from megatron_eopd.rollout.handle import EngineHandle
from megatron_eopd.rollout.megatron_engine import MegatronEngine, score_tokens
from megatron_eopd.rollout.placement import Places
from megatron_eopd.rollout.relay import OwnLink, Relay, WireLink, serve
from megatron_eopd.rollout.states import Life
from megatron_eopd.rollout.vllm_engines import Own, VllmEngines
from megatron_eopd.rollout.vllm_options import engine_spec, visible_device
from megatron_eopd.run_log import RunLog
from megatron_eopd.weight_sync.manifest import Manifest
from megatron_eopd.weight_sync.outlet import Outlet
from megatron_eopd.weight_sync.verify import SyncCheck

MANIFEST = "weight_sync/manifest"
"""Its key in the job's store."""
HOP_PATIENCE = 3
"""Times weight_sync.timeout_s, which a stage's leader may wait for an engine of its own host."""


def start_own_engine(
    config: Config, inputs: Inputs, places: Places | None, rank: int
) -> Relay | None:
    """The one that this rank of the job owns. It loads while the caller goes on."""
    seat = places.seat_of(rank) if places is not None else None
    if seat is None:
        return None
    devices = []
    if torch.cuda.is_available():
        devices = [visible_device(index) for index in places.devices_of(seat)]
    spec = engine_spec(
        model_path=config.student.hf_path,
        dtype=config.dtype_of(config.rollout),
        seed=config.seed,
        max_model_len=inputs.max_sequence_length,
        hf_overrides={
            # Without the student's padding, of which a sample would be no token.
            "vocab_size": inputs.tokenizers.vocab_size,
            # As it was read here: vLLM does not know every spelling.
            "rope_parameters": read_hf_config(config.student.hf_path).rope_parameters,
        },
        rollout=config.rollout,
        devices=devices,
        log_path=config.run_dir / "log" / f"engine{seat.number}.txt",
    )
    return Relay(spec)


def make_engine(
    relay: Relay | None,
    config: Config,
    inputs: Inputs,
    places: Places | None,
    store: dist.Store,
    chunks: Sequence[CausalLM],
    context: ParallelContext,
    log: RunLog,
    stop: Interruption,
) -> RolloutEngine:
    """On the student's ranks, collective over them: returns when the engines are ready. `relay`: of
    `start_own_engine`. `store`: the job's."""
    vocab_size = inputs.tokenizers.vocab_size

    def score(sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return score_tokens(chunks, sequences, vocab_size, context)

    if places is None:
        size = config.rollout.max_num_seqs
        return MegatronEngine(chunks, vocab_size, size, context, pause=stop.pause_in_wait)
    # vLLM's model has the compared tokens and no padding, so it never samples any.
    exporter = make_exporter(config, chunks, vocab_size, context)
    rank = context.layout.rank
    own = _own_part(relay, config, places, store, rank, exporter.manifest, exporter, context)
    fleet = _make_fleet(own, config, places, exporter.manifest, log) if rank == 0 else None
    return VllmEngines(
        fleet,
        own,
        exporter.manifest,
        max_model_len=inputs.max_sequence_length,
        weight_sync=config.weight_sync,
        sleeps=config.rollout.placement == "colocated",
        score=score,
        check=SyncCheck(config.weight_sync, config.coarsest_dtype),
        cpu_group=context.cpu_group,
        must_leave=stop.must_leave,
        watch=log.watch_rollout,
    )


def serve_engines(
    config: Config,
    inputs: Inputs,
    places: Places,
    store: dist.Store,
    context: ParallelContext,
    rank: int,
    joined: Callable[[], None],
) -> None:
    """What ranks of engines alone do, until the student lets them go. `rank`: of the job. `joined`:
    called once the student will do so, whatever happens.

    Raises:
        EngineError: the student is gone, late, or has failed.
        Interrupted: it was asked to stop.
    """
    relay = start_own_engine(config, inputs, places, rank)
    own = None
    try:
        manifest = Manifest.from_json(_told(store, config))
        own = _own_part(relay, config, places, store, rank, manifest, None, context)
        joined()
        farewell = None
        while farewell is None:
            farewell = serve(own.wire, relay, own.outlet)
    except LostRankError as error:
        raise EngineError(f"[engines] the student is gone or late: {error}") from None
    finally:
        if own is not None:
            own.outlet.close()
        if relay is not None:
            relay.close()
    if farewell.is_stop:
        raise Interrupted("the student was stopped, and these engines with it")
    if farewell.error is not None:
        raise EngineError(f"[engines] the student ended early: {farewell.error}")


def make_exporter(
    config: Config, chunks: Sequence[CausalLM], vocab_size: int, context: ParallelContext
) -> Exporter:
    """Of the student; see there. Collective."""
    hf_config = read_hf_config(config.student.hf_path)
    bucket_bytes = int(config.weight_sync.bucket_mib * 2**20)
    return Exporter(chunks, hf_config, vocab_size, context, bucket_bytes)


def _own_part(
    relay: Relay | None,
    config: Config,
    places: Places,
    store: dist.Store,
    rank: int,
    manifest: Manifest,
    exporter: Exporter | None,
    context: ParallelContext,
) -> Own:
    """What this rank of the job has to do with engines. Collective over all that take part."""
    if rank == 0:
        store.set(MANIFEST, manifest.to_json())
    minutes = config.longest_pause_s / 60
    wire = _join(PrefixStore("wire/engines", store), places.wire, rank, minutes, None)
    # A host that is lost must not hold the others up for as long as an owner may wait for orders.
    hop_minutes = HOP_PATIENCE * config.weight_sync.timeout_s / 60
    wires = [
        _join(PrefixStore(f"wire/hop{stage}", store), route.hop, rank, hop_minutes, context.device)
        for stage, route in enumerate(places.routes)
    ]
    node = places.nodes[rank]
    outlet = Outlet(
        manifest,
        places.routes,
        wires,
        rank=rank,
        node=node,
        own_stage=context.layout.pp_rank if exporter else None,
        export_buckets=exporter.buckets if exporter else None,
        device=context.device,
        timeout_s=config.weight_sync.timeout_s,
    )
    readers = {seat.number: len(seat.ranks) for seat in places.seats if seat.node == node}
    return Own(relay, wire, outlet, node, readers)


def _join(
    store: dist.Store, ranks: Sequence[int], rank: int, minutes: float, device: torch.device | None
) -> JointWire | None:
    """None for a rank that is not among these, or is the only one. `device`: None for messages."""
    if rank not in ranks or len(ranks) == 1:
        return None
    place = list(ranks).index(rank)
    try:
        return JointWire(store, place, len(ranks), minutes, device or torch.device("cpu"))
    except WireError as error:
        raise lost_rank(error, "meeting those that own engines") from error


def _make_fleet(own: Own, config: Config, places: Places, manifest: Manifest, log: RunLog) -> Fleet:
    links = {rank: WireLink(own.wire, place) for place, rank in enumerate(places.wire) if place}
    if own.relay is not None:
        links[0] = OwnLink(own.relay)
    handles = [
        EngineHandle(seat, Life(seat.number, config.rollout.max_restarts), links.pop(seat.owner))
        for seat in places.seats
    ]
    return Fleet(handles, list(links.values()), manifest, config.rollout, log.line)


def _told(store: dist.Store, config: Config) -> str:
    """The manifest, which the student knows once its model is built."""
    store.wait([MANIFEST], timedelta(seconds=config.longest_pause_s))
    return store.get(MANIFEST).decode()
