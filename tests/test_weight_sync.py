"""The wire format, what ranks hand on between hosts, and the check of what engines hold."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, PrefixStore

from megatron_eopd.config import WeightSyncConfig
from megatron_eopd.errors import EngineError, TransferError, WireError
from megatron_eopd.parallel.wire import JointWire
from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.weight_sync import buckets as buckets_module
from megatron_eopd.weight_sync.buckets import (
    buffer_bytes,
    checksums,
    offsets,
    pack,
    unpack,
    weighted_sums,
)
from megatron_eopd.weight_sync.manifest import Bucket, Manifest, TensorSpec
from megatron_eopd.weight_sync.outlet import Outlet
from megatron_eopd.weight_sync.ring import RingReader
from megatron_eopd.weight_sync.route import StageRoute
from megatron_eopd.weight_sync.verify import (
    EXPECTED_ROUNDING,
    SyncCheck,
    mean_difference,
    probe_sequences,
)

CPU = torch.device("cpu")
# Odd sizes and mixed types, so that nothing is aligned by accident.
BUCKET = (
    TensorSpec("a", "bfloat16", (3,)),
    TensorSpec("b", "float32", (5, 3)),
    TensorSpec("c", "bfloat16", (7, 1, 3)),
    TensorSpec("d", "float32", ()),
)


def tensors_of(bucket) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s.shape, generator=generator).to(s.torch_dtype) for s in bucket]


def packed(bucket: Bucket, tensors: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
    """Into memory that had something else in it."""
    buffer = torch.full((buffer_bytes(bucket),), 0xA5, dtype=torch.uint8)
    pack(bucket, tensors_of(bucket) if tensors is None else tensors, buffer)
    return buffer


def test_unpack_returns_what_pack_was_given():
    """Bit for bit, in any mixture of types and odd sizes, on 16-byte boundaries."""
    tensors = tensors_of(BUCKET)
    tensors[1] = tensors[1].t().contiguous().t()  # the exporter may hand over a transposed view
    buffer = packed(BUCKET, tensors)
    assert all(start % 16 == 0 for start in offsets(BUCKET))
    unpacked = unpack(BUCKET, buffer)
    assert [name for name, _ in unpacked] == ["a", "b", "c", "d"]
    for (_, got), sent in zip(unpacked, tensors, strict=True):
        assert got.dtype == sent.dtype and torch.equal(got, sent)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, buffer_bytes(BUCKET) - 1), st.integers(1, 255))
def test_no_changed_byte_passes(position, change):
    """Wherever it is: in a tensor, in the gap behind one, or in a checksum."""
    buffer = packed(BUCKET)
    buffer[position] ^= change
    with pytest.raises(ValueError, match="tensors arrived changed"):
        unpack(BUCKET, buffer)


def test_error_names_the_tensor_that_changed():
    buffer = packed(BUCKET)
    buffer[offsets(BUCKET)[2]] ^= 1
    with pytest.raises(ValueError, match=r"1 of 4 tensors .*: c$"):
        unpack(BUCKET, buffer)


def test_the_same_tensors_make_the_same_bytes():
    """Gaps are zero, whatever was in the memory before."""
    dirty, clean = packed(BUCKET), torch.zeros(buffer_bytes(BUCKET), dtype=torch.uint8)
    pack(BUCKET, tensors_of(BUCKET), clean)
    assert torch.equal(dirty, clean)


CHUNK = 1 << 10


@pytest.mark.parametrize("sums_of", [checksums, weighted_sums])
@pytest.mark.parametrize("distance", [1, 2, 512, CHUNK, CHUNK + 1])
def test_checksum_sees_exchanged_words(sums_of, distance, monkeypatch):
    """Also when they differ in the sign of one float alone, the top bit of a word, and when they
    lie in different chunks of the computation. That of the part behind stays what it was."""
    monkeypatch.setattr(buckets_module, "WORDS_PER_CHUNK", CHUNK)
    words = torch.arange(2 * CHUNK + 8)
    words[0], words[distance] = 7, 7 ^ (-1 << 63)
    exchanged = words.clone()
    exchanged[0], exchanged[distance] = words[distance], words[0]
    starts = [0, 16 * CHUNK, 16 * CHUNK + 64]
    before, after = (sums_of(w.view(torch.uint8), starts) for w in (words, exchanged))
    assert before.dtype == torch.int64 and (before != after).tolist() == [True, False]


@pytest.mark.parametrize("chunk", [1 << 22, 1000, 999, 64, 1])
def test_weighted_sums_are_those_of_plain_python(chunk, monkeypatch):
    """Σ (w ^ (w >> 32)) · (2i + 1) modulo 2^64 over the words of a part, unsigned, in whatever
    chunks: what any device must find. One part is empty."""
    monkeypatch.setattr(buckets_module, "WORDS_PER_CHUNK", chunk)
    data = torch.randint(0, 256, (8 * 1000,), dtype=torch.uint8)
    words = memoryview(data.numpy().tobytes()).cast("Q")
    bounds = [0, 2, 64, 64, 640, 998, 1000]
    expected = [
        sum((words[i] ^ (words[i] >> 32)) * (2 * i + 1) for i in range(a, b)) % 2**64
        for a, b in pairwise(bounds)
    ]
    found = weighted_sums(data, [8 * bound for bound in bounds])
    assert [total % 2**64 for total in found.tolist()] == expected


def test_checksums_on_a_cpu_are_xxh3_of_each_part():
    """As signed words. Of an empty part, the digest that XXH3's own test vectors have."""
    data = torch.randint(0, 256, (48,), dtype=torch.uint8)
    raw = data.numpy().tobytes()
    found = checksums(data, [0, 16, 16, 48])
    digests = [xxhash.xxh3_64_intdigest(raw[a:b]) for a, b in ((0, 16), (16, 16), (16, 48))]
    assert digests[1] == 0x2D06800538D394C2
    assert found.tolist() == [digest - (1 << 63) for digest in digests]


@pytest.mark.parametrize(
    ("position", "tensor", "message"),
    [
        (0, torch.zeros(4, dtype=torch.bfloat16), r"a is torch.bfloat16 \(4,\).* \(3,\)"),
        (1, torch.zeros(5, 3, dtype=torch.bfloat16), r"b is torch.bfloat16.*torch.float32"),
    ],
)
def test_pack_refuses_what_the_manifest_does_not_say(position, tensor, message):
    tensors = tensors_of(BUCKET)
    tensors[position] = tensor
    with pytest.raises(ValueError, match=message):
        packed(BUCKET, tensors)


def test_pack_refuses_an_incomplete_bucket():
    with pytest.raises(ValueError, match="a bucket of 3 tensors where the manifest has 4: a, b"):
        packed(BUCKET, tensors_of(BUCKET)[:3])


def test_manifest_survives_json_and_its_digest_sees_every_field():
    manifest = Manifest(((BUCKET[:2], BUCKET[2:]), (BUCKET[:1],)))
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest and again.digest == manifest.digest
    others = [
        Manifest(((BUCKET[:2], BUCKET[2:]),)),
        Manifest(((BUCKET[:1], BUCKET[1:]), (BUCKET[:1],))),  # other buckets, same names
        Manifest.from_json(manifest.to_json().replace("bfloat16", "float16")),
        Manifest.from_json(manifest.to_json().replace('"a"', '"e"')),
    ]
    assert len({other.digest for other in [manifest, *others]}) == 5


# What ranks hand on. Two hosts, a stage of the pipeline and an engine on each, in this process.

STAGES = tuple(
    tuple((TensorSpec(f"{stage}.{n}", "float32", (300 + n,)),) for n in range(6))
    for stage in range(2)
)
BOTH_WAYS = (StageRoute(0, {0: 0, 1: 1}), StageRoute(1, {0: 0, 1: 1}))
AT_ONCE_S = 3.0
"""Far below every time-out here, far above what a notice takes on a busy machine."""
Export = Callable[[], Iterator[list[torch.Tensor]]]


def export_of(stage: int, changed: Callable[[list], Iterator] = iter) -> Export:
    """Its buckets, or what `changed` makes of them."""
    return lambda: changed([tensors_of(bucket) for bucket in STAGES[stage]])


def failing_at(number: int) -> Callable[[list], Iterator]:
    def export(buckets: list) -> Iterator:
        yield from buckets[:number]
        raise ArithmeticError("the export failed")

    return export


@contextmanager
def two_hosts(exports: Sequence[Export], minutes: float = 0.1) -> Iterator[list[Outlet]]:
    """Their outlets, joined by gloo; rank r is alone on host r and leads stage r."""
    store = HashStore()

    def join(rank: int) -> Outlet:
        wires = [
            JointWire(PrefixStore(str(stage), store), route.hop.index(rank), 2, minutes, CPU)
            for stage, route in enumerate(BOTH_WAYS)
        ]
        return Outlet(
            Manifest(STAGES),
            BOTH_WAYS,
            wires,
            rank=rank,
            node=rank,
            own_stage=rank,
            export_buckets=exports[rank],
            device=CPU,
            timeout_s=10,
        )

    with ThreadPoolExecutor(2) as pool:
        outlets = list(pool.map(join, range(2)))
    yield outlets
    for outlet in outlets:
        outlet.close()


def take_stages(readers: dict[int, RingReader]) -> list[list]:
    """What a worker gets, stage by stage; of a stage that ends early the error is the last."""

    def take(stage: int) -> list:
        taken: list = []
        try:
            for bucket in STAGES[stage]:
                taken += unpack(bucket, readers[stage].take())
        except TransferError as error:
            taken.append(error)
        readers[stage].close()
        return taken

    with ThreadPoolExecutor(len(readers)) as pool:
        return list(pool.map(take, sorted(readers)))


def sync(outlets: Sequence[Outlet], num_readers: int = 1) -> tuple[list[Future], list[list[list]]]:
    """How the outlets ended, and what each worker of each host got."""
    opened = [outlet.open(num_readers) for outlet in outlets]
    workers = [
        {stage: RingReader(addresses[worker]) for stage, addresses in stages.items()}
        for stages in opened
        for worker in range(num_readers)
    ]
    begin = time.monotonic()
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(outlet.run) for outlet in outlets]
        taken = list(pool.map(take_stages, workers))
    assert time.monotonic() - begin < AT_ONCE_S
    return runs, taken


def assert_whole(taken: list[list[list]]) -> None:
    for stages in taken:
        for stage, got in enumerate(stages):
            sent = [tensor for bucket in STAGES[stage] for tensor in tensors_of(bucket)]
            assert [name for name, _ in got] == [spec.name for (spec,) in STAGES[stage]]
            assert all(torch.equal(a, b) for (_, a), b in zip(got, sent, strict=True))


@pytest.mark.parametrize("num_readers", [1, 2])
def test_stages_cross_hosts_both_ways(num_readers):
    """Each rank leads one stage and forwards the other; one sync after the other on one wire."""
    with two_hosts([export_of(0), export_of(1)]) as outlets:
        for _ in range(2):
            runs, taken = sync(outlets, num_readers)
            assert len(taken) == 2 * num_readers
            assert_whole(taken)
            for times in (run.result() for run in runs):
                assert times.gather > 0 and times.hop > 0 and times.hand_over > 0


def test_hosts_without_readers_hand_nothing_over_and_wait_for_nobody():
    with two_hosts([export_of(0), export_of(1)]) as outlets:
        runs, _ = sync(outlets, 0)
        assert [run.exception() for run in runs] == [None, None]


BROKEN = {
    "fails at once": (failing_at(0), "the export failed"),
    "fails later": (failing_at(3), "the export failed"),
    "too few": (lambda b: iter(b[:2]), "2 buckets were exported, and the manifest has 6"),
    "none": (lambda b: iter([]), "0 buckets were exported, and the manifest has 6"),
    "another shape": (
        lambda b: iter([*b[:1], [torch.zeros(7)], *b[2:]]),
        r"0.1 is torch.float32 \(7,\), and the manifest says torch.float32 \(301,\)",
    ),
    "and fails as well": (
        lambda b: failing_at(2)([[torch.zeros(7)], *b]),
        r"0.0 is torch.float32 \(7,\)",
    ),
}


@pytest.mark.parametrize("changed,message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_export_lets_go_of_readers_on_every_host_at_once(changed, message):
    """They hear that the trainer gave up. The rank itself raises what happened, the one that hands
    on for it that it came to nothing, and the other stage arrives whole. The wires are in step: the
    next sync is sound."""
    exports = [export_of(0, changed), export_of(1)]
    with two_hosts([lambda: exports[0](), exports[1]]) as outlets:
        (leader, forwarder), taken = sync(outlets)
        with pytest.raises((ValueError, ArithmeticError), match=message):
            leader.result()
        with pytest.raises(TransferError, match="leader of the stage gave up"):
            forwarder.result()
        for stages in taken:
            assert isinstance(stages[0][-1], TransferError) and len(stages[0]) < 6
            assert "gave up" in str(stages[0][-1])
        assert len(taken[0][1]) == len(taken[1][1]) == 6
        exports[0] = export_of(0)
        runs, taken = sync(outlets)
        assert [run.exception() for run in runs] == [None, None]
        assert_whole(taken)


def test_a_bucket_too_many_is_an_error():
    """Readers have all that the manifest promised by then."""
    with two_hosts([export_of(0, lambda b: iter([*b, b[0]])), export_of(1)]) as outlets:
        (leader, _), taken = sync(outlets)
        with pytest.raises(ValueError, match="a bucket more than the manifest's 6"):
            leader.result()
        assert_whole(taken)


def test_who_has_not_opened_the_memory_by_then_is_not_waited_for():
    """One whose process ended before: the others get all, at once."""
    with two_hosts([export_of(0), export_of(1)]) as outlets:
        opened = [outlet.open(2) for outlet in outlets]
        readers = [{s: RingReader(a[1]) for s, a in stages.items()} for stages in opened]
        begin = time.monotonic()
        with ThreadPoolExecutor() as pool:
            runs = [pool.submit(outlet.run) for outlet in outlets]
            taken = list(pool.map(take_stages, readers))
        assert [run.exception() for run in runs] == [None, None]
        assert time.monotonic() - begin < AT_ONCE_S
        assert_whole(taken)


def test_a_host_that_does_not_come_lets_go_of_the_leaders_own_readers():
    """A bucket larger than any socket buffer cannot leave."""
    bucket = (TensorSpec("large", "float32", (4 << 20,)),)
    store, route = HashStore(), StageRoute(0, {0: 0, 1: 1})
    with ThreadPoolExecutor(2) as pool:
        wire, _other = pool.map(lambda r: JointWire(store, r, 2, 0.5 / 60, CPU), range(2))
    outlet = Outlet(
        Manifest(((bucket,),)),
        [route],
        [wire],
        rank=0,
        node=0,
        own_stage=0,
        export_buckets=lambda: iter([[torch.zeros(4 << 20)]]),
        device=CPU,
        timeout_s=10,
    )
    reader = RingReader(outlet.open(1)[0][0])
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(outlet.run)
        with pytest.raises(TransferError, match="gave up"):
            reader.take()
        with pytest.raises(WireError):
            run.result()
    reader.close()
    outlet.close()


@pytest.mark.parametrize("changed", [iter, failing_at(3)], ids=["sound", "failing"])
def test_a_rank_that_does_not_lead_takes_part_in_the_export(changed):
    """To its end, because the leader is in the same collectives."""
    seen = []

    def export() -> Iterator[list[torch.Tensor]]:
        for tensors in changed(list(range(6))):
            seen.append(tensors)
            yield []

    outlet = Outlet(
        Manifest(STAGES[:1]),
        [StageRoute(0, {0: 0})],
        [None],
        rank=1,
        node=0,
        own_stage=0,
        export_buckets=export,
        device=CPU,
        timeout_s=10,
    )
    assert outlet.open(3) == {}
    if changed is iter:
        outlet.run()
    else:
        with pytest.raises(ArithmeticError, match="the export failed"):
            outlet.run()
    assert seen == list(range(6 if changed is iter else 3))


LIKELY = [math.log(0.5)] * 8


def test_only_likely_tokens_are_compared():
    """A rare token is off by a step of bfloat16 and does not count; fewer than eight likely ones
    are filled up with the likeliest."""
    trainer = [[*LIKELY[:4], -30.0], LIKELY[4:]]
    engine = [[*[x - 0.01 for x in LIKELY[:4]], -29.0], LIKELY[4:]]
    difference, count = mean_difference(engine, trainer, min_probability=0.1)
    assert count == 8 and difference == pytest.approx(0.005)
    assert mean_difference([[-5.0, -9.0]], [[-4.0, -6.0]], 0.1) == (2.0, 2)


@pytest.mark.parametrize("dtype,rounding", EXPECTED_ROUNDING.items())
def test_the_check_warns_and_stops_by_the_rounding_of_the_first_sync(dtype, rounding):
    def judge(check, difference):
        probe = check.judge([[x - difference for x in LIKELY]], [LIKELY], version=3)
        assert probe.difference == pytest.approx(difference) or difference != difference
        return probe

    quiet, noisy = (SyncCheck(WeightSyncConfig(), dtype) for _ in range(2))
    assert judge(quiet, rounding / 10).verdict == "sound"
    assert judge(quiet, 2.9 * rounding).verdict == "sound", "a lucky first figure is no baseline"
    assert judge(quiet, 4 * rounding).verdict == "warn"
    stopped = judge(quiet, 11 * rounding)
    assert stopped.verdict == "stop"
    assert "weight version 3" in stopped.message and "probe_stop_factor=10" in stopped.message
    assert judge(quiet, math.nan).verdict == "stop"
    assert judge(noisy, 2.5 * rounding).verdict == "sound"
    assert judge(noisy, 7 * rounding).verdict == "sound", "three times what was measured"
    assert judge(noisy, 8 * rounding).verdict == "warn"
    assert judge(SyncCheck(WeightSyncConfig(), dtype), 11 * rounding).verdict == "stop"


def test_probes_are_of_prompts_and_of_the_newest_responses():
    prompts = [Prompt(i, "", "", (i,) * 300) for i in range(10)]
    rollouts = [Rollout(p, 0, (90,) * 300, (0.0,) * 300, "stop", 1) for p in prompts]
    probes = probe_sequences(prompts, rollouts, max_tokens=40)
    assert [(ids[0], ids[-1], len(ids)) for ids in probes] == [
        *((i, i, 40) for i in (0, 5)),
        *((i, 90, 40) for i in (0, 5)),
    ]
    assert len(probe_sequences(prompts[:1], [], max_tokens=500)[0]) == 96
    assert probe_sequences([Prompt(0, "", "", (1,))], [], 40) == [], "nothing to predict"


def test_a_first_sync_that_warns_is_no_baseline():
    check = SyncCheck(WeightSyncConfig(), "bfloat16")

    def judge(difference):
        return check.judge([[x - difference for x in LIKELY]], [LIKELY], version=0).verdict

    assert [judge(0.25), judge(0.25), judge(0.35)] == ["warn", "warn", "stop"]


def test_broken_weights_are_not_blamed_on_the_engine():
    with pytest.raises(EngineError, match=r"the trainer's own log-probabilities .* are nan"):
        SyncCheck(WeightSyncConfig(), "float32").judge([LIKELY], [[math.nan, *LIKELY[1:]]], 3)
